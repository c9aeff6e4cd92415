"""Reference of :mod:`vllm_sparse.kernels.vertical_slash`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.query_blocks import block_spans
from vllm_sparse.pages.query_blocks import QueryBlocks


def vertical_slash(
    page_keep: torch.Tensor,
    band_count: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    keep: torch.Tensor,
) -> None:
    start, end = block_spans(blocks, keep.device)
    page = torch.arange(keep.shape[1], device=keep.device)
    nearest = ((start + 1) // page_size - 1)[:, None] - page
    farthest = ((end - 1) // page_size)[:, None] - page
    seen = farthest >= 0
    slash = band_count[:, (farthest + 1).clamp(min=0)] > band_count[:, nearest.clamp(min=0)]
    kept = (slash | page_keep[:, None, : keep.shape[1]].bool()) & seen
    keep.copy_(kept.flatten(0, 1))

"""Reference of :mod:`vllm_sparse.kernels.pooled_score`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.query_blocks import context_keys
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks


def pooled_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    pooled: torch.Tensor,
    scores: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    group = q.shape[1] // kv.shape[1]
    means = torch.stack([part.float().mean(0) for part in q.split(BLOCK_TOKENS)], 1)
    pooled[: scores.shape[0]] = means.flatten(0, 1).to(pooled.dtype)
    keys = context_keys(kv, block_table, blocks, page_size)
    first = torch.arange(scores.shape[1], device=kv.device)[:, None] * page_size
    means = keys.sum(2) / (blocks.end_position - first).clamp(max=page_size)
    means = means.to(pooled.dtype).float().repeat_interleave(group, 0)
    queries = pooled[: scores.shape[0]].float().unflatten(0, (-1, blocks.num_blocks))
    chosen = slice(None) if heads is None else heads.bool()
    scores.unflatten(0, (-1, blocks.num_blocks))[chosen] = (queries @ means.transpose(1, 2) * scale)[chosen]

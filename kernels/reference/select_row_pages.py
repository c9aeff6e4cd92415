"""Reference of :mod:`vllm_sparse.kernels.select_row_pages`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.query_blocks import block_spans
from vllm_sparse.kernels.reference.select_bands import largest
from vllm_sparse.pages.query_blocks import QueryBlocks


def select_row_pages(
    scores: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    wanted_pages: int,
    top_p: float,
    keep: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    start, _ = block_spans(blocks, scores.device)
    counts = (start // page_size).repeat(scores.shape[0] // blocks.num_blocks)
    for row, count in enumerate(counts.tolist()):
        if heads is not None and not heads[row // blocks.num_blocks]:
            continue
        keep[row] = 0
        if count == 0:
            continue
        mass = scores[row : row + 1, :count]
        mass.copy_((mass - mass.max()).exp())
        keep[row, :count] = (_fewest(mass, top_p) if top_p else largest(mass, wanted_pages))[0]


def _fewest(masses: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the largest of each row that hold ``top_p`` of it, with all that equal the last of them."""
    if top_p >= 1:
        return torch.ones_like(masses, dtype=torch.bool)
    ordered = masses.sort(dim=1, descending=True).values
    short = ordered.cumsum(1) < top_p * ordered.sum(1, keepdim=True)
    last = short.sum(1, keepdim=True).clamp(max=masses.shape[1] - 1)
    return (masses >= ordered.gather(1, last)) & (masses > 0)

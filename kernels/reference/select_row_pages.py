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
    own_pages: bool = False,
) -> None:
    start, end = block_spans(blocks, scores.device)
    spans = list(zip((start // page_size).tolist(), (-(-end // page_size)).tolist(), strict=True))
    for row, (count, past) in enumerate(spans * (scores.shape[0] // blocks.num_blocks)):
        if heads is not None and not heads[row // blocks.num_blocks]:
            continue
        keep[row] = 0
        if count == 0:
            continue
        mass = scores[row : row + 1, :count]
        beside = (scores[row, count:past] - mass.max()).exp().sum() if own_pages else 0.0
        mass.copy_((mass - mass.max()).exp())
        keep[row, :count] = (_fewest(mass, top_p, beside) if top_p else largest(mass, wanted_pages))[0]


def _fewest(masses: torch.Tensor, top_p: float, beside: torch.Tensor | float) -> torch.Tensor:
    """Mask of the largest of each row that hold ``top_p`` of it and what is ``beside`` it, with all that equal the
    last of them."""
    if top_p >= 1:
        return torch.ones_like(masses, dtype=torch.bool)
    ordered = masses.sort(dim=1, descending=True).values
    short = ordered.cumsum(1) < top_p * (ordered.sum(1, keepdim=True) + beside) - beside
    last = short.sum(1, keepdim=True).clamp(max=masses.shape[1] - 1)
    return (masses >= ordered.gather(1, last)) & (masses > 0)

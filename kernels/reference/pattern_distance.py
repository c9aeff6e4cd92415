"""Reference of :mod:`vllm_sparse.kernels.pattern_distance`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks


def pattern_distance(
    mass: torch.Tensor,
    scores: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    threshold: float,
    query_aware: torch.Tensor,
) -> None:
    page = torch.arange(scores.shape[1], device=scores.device)
    tokens = (chunk.end_position - page * page_size).clamp(max=page_size)

    def of_blocks(of_pages: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum(-1) for part in of_pages.split(max(1, BLOCK_TOKENS // page_size), -1)], -1)

    pooled = (of_blocks(scores * tokens) / of_blocks(tokens)).softmax(1)
    true = of_blocks(mass.sum(1))
    true = true / true.sum(1, keepdim=True)
    both = torch.stack([pooled, true])
    divergence = torch.special.xlogy(both, both / both.mean(0).clamp(min=1e-38)).sum((0, 2)) / 2
    query_aware.copy_(divergence < threshold**2)

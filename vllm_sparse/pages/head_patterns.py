"""HeadPatterns: what each query head of a layer keeps of a chunk, as the kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadPattern:
    """Columns and diagonals that one query head keeps; sinks and the recent window come on top.

    The patterns of Jiang et al., "MInference 1.0", arXiv 2407.02490: with ``recent_tokens`` alone a head
    is an A-shape, otherwise vertical-slash.
    """

    vertical_tokens: int = 0
    """Columns, in whole pages, where ``top_p`` is 0."""
    slash_tokens: int = 0
    """Diagonals, in bands of a page, where ``top_p`` is 0."""
    recent_tokens: int = 0
    """Diagonals nearest to the query, in bands of a page, whatever the estimate says of them."""
    top_p: float = 0.0
    """Share of the estimated attention that columns and diagonals hold; 0: the sizes above."""


@dataclass
class HeadPatterns:
    """Patterns of the query heads of one layer on one rank, made once and read by ``select_bands``."""

    sizes: torch.Tensor
    """int32 [3, q_heads]: pages, bands of diagonals, and nearest bands to keep."""
    top_p: torch.Tensor
    """float32 [q_heads]: share of a head's mass to keep; 0: ``sizes``; all from 1 on."""

    @classmethod
    def of(cls, patterns: Sequence[HeadPattern], page_size: int, device: torch.device) -> HeadPatterns:
        """``patterns``: one for each query head."""
        tokens = [(p.vertical_tokens, p.slash_tokens, p.recent_tokens) for p in patterns]
        pages = [[-(-n // page_size) for n in sizes] for sizes in zip(*tokens, strict=True)]
        return cls(
            torch.tensor(pages, dtype=torch.int32, device=device),
            torch.tensor([p.top_p for p in patterns], dtype=torch.float32, device=device),
        )

"""HeadPatterns: what each query head of a layer keeps of a chunk, as the kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sparse.config import SparseConfig
from vllm_sparse.pattern_table import HeadPattern


@dataclass
class HeadPatterns:
    """Patterns of the query heads of one layer on one rank, made once and read by ``select_bands``."""

    sizes: torch.Tensor
    """int32 [3, q_heads]: pages, bands of diagonals, and nearest bands to keep."""
    coverage: torch.Tensor
    """float32 [q_heads]: share of a head's mass to keep; 0: ``sizes``; all from 1 on."""

    @classmethod
    def of(cls, patterns: Sequence[HeadPattern], page_size: int, device: torch.device) -> HeadPatterns:
        """``patterns``: one for each query head."""
        tokens = [(p.vertical_tokens, p.slash_tokens, p.recent_tokens) for p in patterns]
        pages = [[-(-n // page_size) for n in sizes] for sizes in zip(*tokens, strict=True)]
        return cls(
            torch.tensor(pages, dtype=torch.int32, device=device),
            torch.tensor([p.coverage for p in patterns], dtype=torch.float32, device=device),
        )

    @classmethod
    def uniform(cls, config: SparseConfig, q_heads: int, page_size: int, device: torch.device) -> HeadPatterns:
        """The sizes or the coverage of ``config`` for all heads."""
        return cls.of([config.uniform_pattern] * q_heads, page_size, device)

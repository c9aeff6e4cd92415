"""PageScores: what a policy writes and selection reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK_PAGES = 64
"""Pages that share one entry of ``chunk_lse``."""


@dataclass
class PageScores:
    """Scores of a decode step's pages, ragged over requests, in units of log-mass.

    Page p of request r is column ``offset_r + p`` with ``offset_r = plan.score_offsets[r]``. Chunk c
    of 64 pages is column ``offset_r // 64 + r + c`` of ``chunk_lse``, which lets selection normalise
    a head over its whole context without reading all of its scores.
    """

    values: torch.Tensor
    """float32 [q_heads, capacity_pages]."""
    chunk_lse: torch.Tensor
    """float32 [q_heads, capacity_chunks]: log-sum-exp of ``values`` over each chunk."""
    arrivals: torch.Tensor
    """int32 [max_num_reqs * q_heads or more], 0 between launches: segments of a row that selection has done."""

    @classmethod
    def empty(cls, q_heads: int, capacity_pages: int, max_num_reqs: int, device: torch.device) -> PageScores:
        chunks = capacity_pages // CHUNK_PAGES + max_num_reqs + 1
        return cls(
            torch.zeros(q_heads, capacity_pages, dtype=torch.float32, device=device),
            torch.zeros(q_heads, chunks, dtype=torch.float32, device=device),
            torch.zeros(max_num_reqs * q_heads, dtype=torch.int32, device=device),
        )

    @property
    def q_heads(self) -> int:
        return self.values.shape[0]

    @property
    def capacity_pages(self) -> int:
        return self.values.shape[1]

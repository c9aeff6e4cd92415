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

    A KV head has a row for each of its query heads, and where requests have several query tokens as many again for
    each token that is asked: row ``(kv_head * asked + token) * group + h``.
    """

    values: torch.Tensor
    """float32 [rows, capacity_pages]."""
    chunk_lse: torch.Tensor
    """float32 [rows, capacity_chunks]: log-sum-exp of ``values`` over each chunk."""
    arrivals: torch.Tensor
    """int32 [max_num_reqs * kv_heads or more], 0 between launches: segments of a row that selection has done."""

    @classmethod
    def empty(cls, rows: int, capacity_pages: int, max_num_reqs: int, device: torch.device) -> PageScores:
        chunks = capacity_pages // CHUNK_PAGES + max_num_reqs + 1
        return cls(
            torch.zeros(rows, capacity_pages, dtype=torch.float32, device=device),
            torch.zeros(rows, chunks, dtype=torch.float32, device=device),
            torch.zeros(max_num_reqs * rows, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> PageScores:
        """The first ``rows`` rows, without a copy."""
        return PageScores(self.values[:rows], self.chunk_lse[:rows], self.arrivals)

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def capacity_pages(self) -> int:
        return self.values.shape[1]

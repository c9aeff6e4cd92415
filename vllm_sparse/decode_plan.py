"""DecodePlan: which decode rows of a step are sparse, computed once per step on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_CHUNK = 2**31 - 1


@dataclass
class DecodePlan:
    """Per-request routing of one decode step; device tensors, so a CUDA graph can replay it.

    A row is attended through the page table (``table_seq_lens > 0``), by the dense backend
    (``dense_seq_lens > 0``), or is padding (both 0). A row of the page table holds either every
    page of a short context (``score_offsets < 0``) or the chosen pages of a long one.

    Kernels of a layer launch a fixed number of programs that share what ``work`` lists, so a step
    without any costs a launch and no more, whatever its batch.
    """

    table_seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens of rows that go through the page table, else 0."""
    dense_seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens of rows that the dense backend attends, else 0."""
    score_offsets: torch.Tensor
    """int32 [num_reqs]: column of the request's first page in the score buffer; -1: not scored."""
    work: torch.Tensor
    """int32 [num_reqs, 4]: the rows of the page table, scored ones first, undefined past their number:
    request, context tokens, first column in the score buffer or -1, and the chunks of pages up to and
    with this row (``NO_CHUNK`` in every row that is not scored)."""
    totals: torch.Tensor
    """int32 [3]: scored rows, rows of the page table, chunks of all scored rows."""
    counters: torch.Tensor
    """int64 [2], running totals over steps: tokens attended, context tokens (one layer, one head)."""

    @classmethod
    def empty(cls, max_num_reqs: int, device: torch.device) -> DecodePlan:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            table_seq_lens=zeros(max_num_reqs),
            dense_seq_lens=zeros(max_num_reqs),
            score_offsets=zeros(max_num_reqs),
            work=zeros(max_num_reqs, 4),
            totals=zeros(3),
            counters=torch.zeros(2, dtype=torch.int64, device=device),
        )

    def rows(self, num_reqs: int) -> DecodePlan:
        """The first ``num_reqs`` rows, without a copy."""
        return DecodePlan(
            self.table_seq_lens[:num_reqs],
            self.dense_seq_lens[:num_reqs],
            self.score_offsets[:num_reqs],
            self.work[:num_reqs],
            self.totals,
            self.counters,
        )

"""DecodePlan: which decode rows of a step are sparse, computed once per step on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.query_tokens import ONE, QueryTokens

NOT_LISTED = 2**31 - 1
EVERY_PAGE, WHOLE = -1, -2
"""In place of a row's first column in the score buffer: its page table lists every page, or it has none and is
read through the block table."""
EXACT, PROMPT = -1, -2
"""In place of the pages that a row asks for: it attends to its whole context, as its request wants it or because
it is a prompt token."""
WORK_COLUMNS = 5
COUNTERS = (
    "attended_tokens", "context_tokens", "rows", "sparse_rows", "short_rows", "covered_rows", "steps",
    "sparse_steps", "exact_rows",
)  # fmt: skip
"""What :attr:`DecodePlan.counters` adds up over steps, of rows that are no prompt tokens:

- tokens attended and tokens in the contexts, by all query tokens, in one layer and head;
- rows; those with chosen pages; those up to the shortest sparse context; those beyond it whose context the budget
  covers. What is left of them had no room for scores, or is exact;
- steps with rows, and those of them with a sparse row;
- rows beyond the shortest sparse context whose requests want exact attention.
"""
SEGMENT_PAGES, USUAL_SEGMENT_PAGES, MAX_SEGMENT_PAGES = 2048, 4096, 32768
MANY_SEGMENTS = 17
MAX_CANDIDATES = 32768
"""Selection counts in packed pairs of 16 bits: neither a segment nor what is merged may hold more."""


def segment_pages(max_pages: int, budget_pages: int) -> int:
    """Pages that one program of selection ranks: small segments run in parallel, few are quick to merge.

    A power of two: 2,048, with which a row of 512K tokens at page 16 has 16, or the 4,096 that fit the
    registers of one program; more only where the merge could not hold a budget from each segment, and where the
    budget is the whole context: what requests with less choose is then not merged, if they can choose
    (:func:`takes_smaller_budgets`).

    Raises:
        ConfigError: no size serves this budget at this context.
    """
    if budget_pages >= max_pages:
        return min(max(SEGMENT_PAGES, 1 << (max_pages - 1).bit_length()), MAX_SEGMENT_PAGES)
    budget = 1 << (budget_pages - 1).bit_length()
    pages = SEGMENT_PAGES
    while pages < USUAL_SEGMENT_PAGES and (-(-max_pages // pages) > MANY_SEGMENTS or pages < 8 * budget):
        pages *= 2
    while -(-max_pages // pages) * budget > MAX_CANDIDATES and max_pages > pages:
        pages *= 2
    if pages > MAX_SEGMENT_PAGES:
        raise ConfigError(
            f"sparse.budget_tokens: {budget_pages} pages cannot be chosen from contexts of {max_pages} pages; "
            f"allowed: a smaller budget, a smaller --max-model-len, or a larger --block-size"
        )
    return pages


def takes_smaller_budgets(max_pages: int, budget_pages: int) -> bool:
    """Whether requests may ask for less than ``budget_pages``: not where that is the whole of contexts too long to
    be ranked by one program."""
    return budget_pages < max_pages or max_pages <= MAX_SEGMENT_PAGES


@dataclass
class DecodePlan:
    """Per-request routing of one decode step; device tensors, so a CUDA graph can replay it.

    A row is attended through the page table (``table_seq_lens > 0``), by the dense backend
    (``dense_seq_lens > 0``), or is padding (both 0). A row of the page table holds the chosen pages of a
    long context, every page of a short one (``score_offsets`` is ``EVERY_PAGE``), or nothing for a prompt
    token (``WHOLE``): the last one of a prompt may come alone, in a step that looks like decode, and as any
    token of a prefill it attends to its whole context, however long. Rows of requests that want exact attention
    are the same.

    Kernels of a layer launch a fixed number of programs that share what ``work`` lists, so a step
    without any costs a launch and no more, whatever its batch.
    """

    table_seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens of rows that go through the page table, else 0."""
    dense_seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens of rows that the dense backend attends, else 0."""
    score_offsets: torch.Tensor
    """int32 [num_reqs]: column of the request's first page in the score buffer; below 0: not scored."""
    budgets: torch.Tensor
    """int32 [num_reqs]: pages that a row asks for, ``EXACT`` or ``PROMPT``, written by the host in steps that have
    such rows; 0 in all others, which get the selection's budget."""
    work: torch.Tensor
    """int32 [num_reqs, 5]: the rows of the page table, scored ones first, undefined past their number:
    request, context tokens, its ``score_offsets``; and, running totals up to and with
    this row, the chunks of pages to score (``NOT_LISTED`` in every row that is not scored) and the
    segments to select from, 1 for a row that is not scored (``NOT_LISTED`` in every row past the last)."""
    totals: torch.Tensor
    """int32 [4]: scored rows, rows of the page table, chunks of all rows, segments of all rows."""
    counters: torch.Tensor
    """int64 [len(COUNTERS)], running totals over steps."""
    segment_pages: int
    """Pages of a segment."""
    queries: QueryTokens = ONE
    """Of the step."""

    @property
    def alone_pages(self) -> int:
        """Most pages that one program ranks alone: two segments of the usual size would have to be merged."""
        return USUAL_SEGMENT_PAGES if self.segment_pages == SEGMENT_PAGES else self.segment_pages

    @classmethod
    def empty(cls, max_num_reqs: int, device: torch.device, segment_pages: int = SEGMENT_PAGES) -> DecodePlan:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            table_seq_lens=zeros(max_num_reqs),
            dense_seq_lens=zeros(max_num_reqs),
            score_offsets=zeros(max_num_reqs),
            budgets=zeros(max_num_reqs),
            work=zeros(max_num_reqs, WORK_COLUMNS),
            totals=zeros(4),
            counters=torch.zeros(len(COUNTERS), dtype=torch.int64, device=device),
            segment_pages=segment_pages,
        )

    def rows(self, num_reqs: int, queries: QueryTokens = ONE) -> DecodePlan:
        """The first ``num_reqs`` rows, without a copy, for a step of ``queries``."""
        return DecodePlan(
            self.table_seq_lens[:num_reqs],
            self.dense_seq_lens[:num_reqs],
            self.score_offsets[:num_reqs],
            self.budgets[:num_reqs],
            self.work[:num_reqs],
            self.totals,
            self.counters,
            self.segment_pages,
            queries,
        )

"""PageTable: the one way to say which pages are attended, shared by policies and attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.pages.query_tokens import ONE, QueryTokens


@dataclass
class PageTable:
    """Pages to attend for each (request, KV head), as head pages of one paged KV cache.

    A *head page* is a page of one KV head. With a cache ``[num_blocks, kv_heads, rows, 2 * head_dim]``
    head page ``block * per_block + head * per_head`` starts ``head_page * stride`` elements into the cache
    (:class:`vllm_sparse.pages.layout.HeadPageGrid`), so each row here is an ordinary block table over
    single-head pages, and any paged attention kernel can attend over it.

    Invariants: ids in a row ascend with the position of the page in its context, so the page that
    may be partly filled is the last; entries past ``ceil(lengths / page_size)`` are undefined.
    """

    head_pages: torch.Tensor
    """int32 [num_reqs * kv_heads, max_pages]; row ``req * kv_heads + head``."""
    lengths: torch.Tensor
    """int32 [num_reqs * kv_heads]: tokens attended. 0: the row is not attended through this table."""
    starts: torch.Tensor | None = None
    """int32 [rows + 1], of query blocks alone: the first query of each row, and after them the number of all,
    where queries lie by head. None in decode."""
    routes: torch.Tensor | None = None
    """int32 [num_reqs]: ``WHOLE`` of :mod:`vllm_sparse.pages.decode_plan` where a request's rows are not listed in
    ``head_pages`` and are all pages of ``block_table``; None: there are no such rows."""
    block_table: torch.Tensor | None = None
    """int32 [num_reqs, max_pages], beside ``routes``."""
    queries: QueryTokens = ONE
    """Of a decode step. Where a request has n tokens, token i of them attends to all but the last ``n - 1 - i``
    tokens of a row: a row ends with the request's last tokens, these n among them."""

    @classmethod
    def empty(cls, num_reqs: int, kv_heads: int, max_pages: int, device: torch.device) -> PageTable:
        rows = num_reqs * kv_heads
        return cls(
            head_pages=torch.zeros(rows, max_pages, dtype=torch.int32, device=device),
            lengths=torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def rows(self, num_rows: int, queries: QueryTokens = ONE) -> PageTable:
        """The first ``num_rows`` rows, without a copy, for a decode step of ``queries``."""
        return PageTable(self.head_pages[:num_rows], self.lengths[:num_rows], queries=queries)

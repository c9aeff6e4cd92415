"""Selection: how many pages a decode row keeps, and which of them whatever their scores.

A row may have a smaller budget, which its request asks for. The budgets of KV heads shrink with it, rounded to the
nearest number of pages, down to the smallest budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """What turns scores into chosen pages; the same for all policies."""

    page_size: int
    """Tokens per page."""
    budget_pages: int
    """Pages kept of a scored row; their mean where KV heads have budgets of their own."""
    sink_pages: int
    """First pages, always kept."""
    window_tokens: int
    """Most recent tokens, always kept, in whole pages."""
    top_p: float = 0.0
    """Share of a row's estimated attention at which it ends before its budget; 0: it takes its budget."""
    largest_pages: int | None = None
    """The largest budget of any KV head, where they have their own."""
    head_budget_pages: torch.Tensor | None = None
    """int32 [kv_heads], those budgets; not together with ``top_p``."""

    @property
    def least_pages(self) -> int:
        """The smallest budget: sinks, window and one page to choose."""
        # A window of w tokens can straddle one page border more than it fills.
        return self.sink_pages + -(-self.window_tokens // self.page_size) + 2

    @property
    def most_pages(self) -> int:
        """Most pages kept of any row; contexts of no more pages are attended whole."""
        return self.most_pages_of(self.budget_pages)

    def most_pages_of(self, budget: int) -> int:
        """Most pages kept of a row with ``budget``."""
        return budget if self.largest_pages is None else self.share_of(self.largest_pages, budget)

    def share_of(self, pages: int, budget: int) -> int:
        """Budget in a row with ``budget`` of a KV head that has ``pages`` in rows with ``budget_pages``."""
        scaled = (2 * pages * budget + self.budget_pages) // (2 * self.budget_pages)
        return max(scaled, min(pages, self.least_pages))

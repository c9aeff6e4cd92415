"""Selection: how many pages a decode row keeps, and which of them whatever their scores."""

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
    def most_pages(self) -> int:
        """Most pages kept of any row; contexts of no more pages are attended whole."""
        return self.budget_pages if self.largest_pages is None else self.largest_pages

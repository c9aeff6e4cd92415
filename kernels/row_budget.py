"""Budgets that rows ask for, :attr:`vllm_sparse.pages.decode_plan.DecodePlan.budgets`, as kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_budget(asked, budget_pages):
    """Budget of a row, given what it asks for and what rows have that ask for nothing."""
    return tl.where(asked > 0, asked, budget_pages)


@triton.jit
def share_of(pages, budget, budget_pages, least_pages):
    """Budget of a KV head in a row with ``budget``, given the head's ``pages`` in rows with ``budget_pages``."""
    scaled = (2 * budget.to(tl.int64) * pages + budget_pages) // (2 * budget_pages)
    return tl.maximum(scaled, tl.minimum(pages, least_pages)).to(tl.int32)

"""plan_decode: route the decode rows of a step, once per step, on the device.

    pages_r  = ceil(seq_len_r / page_size)
    scored_r = seq_len_r > min_context and pages_r > budget and its scores fit the buffer
    offset_r = sum of pages over the rows before r that want scoring

Rows that are not scored attend to every page: through the page table, or through the dense
backend where ``short_rows_dense`` says that one runs beside it in this step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.decode_plan import DecodePlan


@triton.jit(do_not_specialize=["num_reqs", "capacity"])
def _plan_decode(
    seq_lens, table_seq_lens, dense_seq_lens, score_offsets, counters,
    num_reqs, budget_pages, min_context, capacity,
    PAGE: tl.constexpr, SHORT_DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    mask = rows < num_reqs
    length = tl.load(seq_lens + rows, mask=mask, other=0).to(tl.int64)
    pages = (length + PAGE - 1) // PAGE
    wanted = (length > min_context) & (pages > budget_pages)
    claimed = tl.where(wanted, pages, 0)
    offset = tl.cumsum(claimed, axis=0) - claimed
    scored = wanted & (offset + pages <= capacity)
    dense = (wanted & (offset + pages > capacity)) | (~wanted & SHORT_DENSE)
    tl.store(table_seq_lens + rows, tl.where(dense, 0, length).to(tl.int32), mask=mask)
    tl.store(dense_seq_lens + rows, tl.where(dense, length, 0).to(tl.int32), mask=mask)
    tl.store(score_offsets + rows, tl.where(scored, offset, -1).to(tl.int32), mask=mask)
    attended = tl.where(scored, length - (pages - budget_pages) * PAGE, length)
    tl.atomic_add(counters, tl.sum(attended, axis=0))
    tl.atomic_add(counters + 1, tl.sum(length, axis=0))


def plan_decode(
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    page_size: int,
    budget_pages: int,
    min_context_tokens: int,
    capacity_pages: int,
    short_rows_dense: bool,
) -> None:
    """Fill ``plan`` for this step.

    Args:
        seq_lens: int32 [num_reqs], context tokens, the current one included; 0 for padding.
        plan: buffers of ``num_reqs`` rows.
        page_size, budget_pages, min_context_tokens: see :class:`vllm_sparse.config.SparseConfig`.
        capacity_pages: columns of the score buffer.
        short_rows_dense: rows that need no scoring go to the dense backend, not the page table.
    """
    num_reqs = seq_lens.shape[0]
    if num_reqs == 0:
        return
    _plan_decode[(1,)](
        seq_lens, plan.table_seq_lens, plan.dense_seq_lens, plan.score_offsets, plan.counters,
        num_reqs, budget_pages, min_context_tokens, capacity_pages,
        PAGE=page_size, SHORT_DENSE=short_rows_dense, BLOCK=max(1024, triton.next_power_of_2(num_reqs)),
    )  # fmt: skip

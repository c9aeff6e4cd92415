"""plan_decode: route the decode rows of a step, once per step, on the device.

    pages_r  = ceil(seq_len_r / page_size)
    budget_r = what the row asks for, else the selection's budget
    scored_r = seq_len_r > min_context and pages_r > budget_r and its scores fit the buffer
    offset_r = sum of pages over the rows before r that want scoring
    length_r = seq_len_r - max(pages_r - budget_r, 0) * page_size   of a scored row

Rows that are not scored attend to every page: through the page table, or through the dense
backend where ``short_rows_dense`` says that one runs beside it in this step. Rows of prompt tokens, and
those that ask for exact attention, are never scored. Where heads have budgets of their own,
``select_pages`` writes the lengths of scored rows anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK, EVERY_PAGE, PROMPT, WHOLE
from vllm_sparse.kernels.row_budget import row_budget, share_of
from vllm_sparse.kernels.select_pages import window_start
from vllm_sparse.kernels.work_list import CHUNK_ENDS, COLUMNS, NOT_LISTED, SEGMENT_ENDS
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection


@triton.jit(do_not_specialize=["num_reqs", "capacity"])
def _plan_decode(
    seq_lens_ptr, starts_ptr, budgets_ptr, table_seq_lens_ptr, dense_seq_lens_ptr, score_offsets_ptr, work_ptr,
    totals_ptr, counters_ptr, lengths_ptr, num_reqs, budget_pages, largest_pages, least_pages, min_context,
    capacity, sink_pages, window_tokens,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ALONE: tl.constexpr,
    SHORT_DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    mask = rows < num_reqs
    seq_len = tl.load(seq_lens_ptr + rows, mask=mask, other=0).to(tl.int64)
    pages = (seq_len + PAGE - 1) // PAGE
    asked = tl.load(budgets_ptr + rows, mask=mask, other=0)
    whole = asked < 0
    budget = row_budget(asked, budget_pages)
    largest = budget
    if largest_pages is not None:
        largest = share_of(largest_pages, budget, budget_pages, least_pages)
    wanted = ~whole & (seq_len > min_context) & (pages > largest)
    claimed = tl.where(wanted, pages, 0)
    offset = tl.cumsum(claimed, axis=0) - claimed
    scored = wanted & (offset + pages <= capacity)
    dense = (wanted & (offset + pages > capacity)) | (~wanted & SHORT_DENSE)
    in_table = tl.where(dense, 0, seq_len)
    tl.store(table_seq_lens_ptr + rows, in_table.to(tl.int32), mask=mask)
    tl.store(dense_seq_lens_ptr + rows, tl.where(dense, seq_len, 0).to(tl.int32), mask=mask)
    route = tl.where(scored, offset, tl.where(whole, WHOLE, EVERY_PAGE)).to(tl.int32)
    tl.store(score_offsets_ptr + rows, route, mask=mask)
    length = tl.where(scored, seq_len - (pages - budget) * PAGE, in_table).to(tl.int32)
    for head in range(KV_HEADS):
        tl.store(lengths_ptr + rows * KV_HEADS + head, length, mask=mask)
    # The work list: scored rows, then short ones. Two counts share a prefix sum, 32 bits each.
    listed = in_table > 0
    numbers = tl.where(scored, 1, listed.to(tl.int64) << 32)
    places, number = tl.cumsum(numbers, axis=0), tl.sum(numbers, axis=0)
    num_scored, num_short = (number & 0xFFFFFFFF).to(tl.int32), (number >> 32).to(tl.int32)
    short_place = (places >> 32).to(tl.int32)
    ranked = window_start(seq_len, window_tokens, PAGE) - sink_pages
    segments = tl.where(ranked <= ALONE, 1, (ranked + SEGMENT - 1) // SEGMENT)
    sizes = tl.where(scored, (pages + CHUNK - 1) // CHUNK + (segments << 32), 0)
    ends, size = tl.cumsum(sizes, axis=0), tl.sum(sizes, axis=0)
    scored_segments = (size >> 32).to(tl.int32)
    item = (
        work_ptr + (tl.where(scored, (places & 0xFFFFFFFF).to(tl.int32), num_scored + short_place) - 1) * COLUMNS
    )
    tl.store(item, rows, mask=listed)
    tl.store(item + 1, seq_len.to(tl.int32), mask=listed)
    tl.store(item + 2, route, mask=listed)
    tl.store(item + CHUNK_ENDS, tl.where(scored, ends & 0xFFFFFFFF, NOT_LISTED).to(tl.int32), mask=listed)
    tl.store(
        item + SEGMENT_ENDS,
        tl.where(scored, (ends >> 32).to(tl.int32), scored_segments + short_place),
        mask=listed,
    )
    past = work_ptr + rows * COLUMNS
    tl.store(past + CHUNK_ENDS, NOT_LISTED, mask=mask & (rows >= num_scored + num_short))
    tl.store(past + SEGMENT_ENDS, NOT_LISTED, mask=mask & (rows >= num_scored + num_short))
    tl.store(totals_ptr, num_scored)
    tl.store(totals_ptr + 1, num_scored + num_short)
    tl.store(totals_ptr + 2, (size & 0xFFFFFFFF).to(tl.int32))
    tl.store(totals_ptr + 3, scored_segments + num_short)
    attended = tl.where(dense, seq_len, length)
    count = tl.full([BLOCK], 1, tl.int64)
    if starts_ptr is not None:
        count = tl.load(starts_ptr + rows + 1, mask=mask, other=0) - tl.load(starts_ptr + rows, mask=mask, other=0)
    count = tl.where(asked == PROMPT, 0, tl.minimum(count, seq_len))
    # Of each token those that come after it are not its context.
    later = count * (count - 1) // 2
    tl.atomic_add(counters_ptr, tl.sum(count * attended - later, axis=0))
    tl.atomic_add(counters_ptr + 1, tl.sum(count * seq_len - later, axis=0))
    # Four counts of rows share two sums: all, short ones and those that the budget covers, and exact ones.
    short = seq_len <= min_context
    kinds = 1 + (short.to(tl.int64) << 21) + ((~short & ~wanted & ~whole).to(tl.int64) << 42)
    kinds = tl.sum(tl.where(count > 0, kinds, 0), axis=0)
    num_rows = kinds & 0x1FFFFF
    tl.atomic_add(counters_ptr + 2, num_rows)
    tl.atomic_add(counters_ptr + 3, num_scored.to(tl.int64))
    tl.atomic_add(counters_ptr + 4, (kinds >> 21) & 0x1FFFFF)
    tl.atomic_add(counters_ptr + 5, kinds >> 42)
    tl.atomic_add(counters_ptr + 6, (num_rows > 0).to(tl.int64))
    tl.atomic_add(counters_ptr + 7, (num_scored > 0).to(tl.int64))
    tl.atomic_add(counters_ptr + 8, tl.sum((whole & ~short & (count > 0)).to(tl.int64), axis=0))


def plan_decode(
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    table: PageTable,
    selection: Selection,
    min_context_tokens: int,
    capacity_pages: int,
    short_rows_dense: bool,
) -> None:
    """Fill ``plan`` and ``table.lengths`` for this step.

    Args:
        seq_lens: int32 [num_reqs], context tokens, the current ones included; 0 for padding.
        plan: buffers of ``num_reqs`` rows; ``budgets`` is read, and ``queries`` to count tokens.
        table: buffers of ``num_reqs * kv_heads`` rows; its head pages are left to ``select_pages``.
        selection: as ``select_pages`` will get it; rows of up to its largest budget, or as much of it as they ask
            for, attend to every page. Attended tokens are counted by the budget that heads have in the mean.
        min_context_tokens: up to this context a row attends to every page.
        capacity_pages: columns of the score buffer.
        short_rows_dense: rows that need no scoring go to the dense backend, not the page table.
    """
    num_reqs = seq_lens.shape[0]
    if num_reqs == 0:
        return
    _plan_decode[(1,)](
        seq_lens, plan.queries.starts, plan.budgets, plan.table_seq_lens, plan.dense_seq_lens, plan.score_offsets,
        plan.work, plan.totals, plan.counters, table.lengths,
        num_reqs, selection.budget_pages, selection.largest_pages, selection.least_pages, min_context_tokens,
        capacity_pages,
        selection.sink_pages, selection.window_tokens,
        KV_HEADS=table.lengths.shape[0] // num_reqs, PAGE=selection.page_size,
        SEGMENT=plan.segment_pages, ALONE=plan.alone_pages,
        SHORT_DENSE=short_rows_dense,
        BLOCK=max(1024, triton.next_power_of_2(num_reqs)),
    )  # fmt: skip

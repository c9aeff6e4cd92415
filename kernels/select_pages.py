"""select_pages: scores of query heads to exactly ``budget`` pages per KV head.

    mass[p]  = sum_{g in group} softmax_p(score[g, p])
    chosen   = sinks, window and current page first, then the largest masses; ties to lower pages

Each head's scores are normalised over the pages of the request before the group is summed, so no
head outvotes the others by scale. Pages that are always chosen are not ranked. Of the others a search
over the masses' integer images finds the last that fits the budget, and a prefix sum writes the kept
ones in ascending order: selection is exact. Rows of more than one segment keep a budget of candidates
per segment; the program that ends last merges them. With a ``top_p`` rows end before their budget:
:mod:`vllm_sparse.kernels.stop_at_top_p`. With ``head_budget_pages`` each KV head has a budget of its own.
Rows that ask for fewer pages get them, and their heads' budgets are as much smaller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK, EVERY_PAGE
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.kernels.row_budget import row_budget, share_of
from vllm_sparse.kernels.stop_at_top_p import FORCED, stop_at_top_p
from vllm_sparse.kernels.work_list import SEGMENT_ENDS, begin_of, entry_of, first_ends, row_of
from vllm_sparse.pages.decode_plan import MAX_CANDIDATES, DecodePlan
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection

TUNING = {"pages_per_warp": 256}
SMALL_PAGES = 1024
"""Most pages of the contexts that take a smaller and faster copy of the same code."""
PROGRAMS_PER_SM = 2
CHUNK_BLOCK: tl.constexpr = tl.constexpr(256)
"""Entries of ``PageScores.chunk_lse`` read at a time."""


@triton.jit
def _keep_largest(keys, budget):
    """Mask of the ``budget`` largest keys, equal ones from the left; keys of 0 are never kept.

    Search for a threshold: each round counts at four candidates in one reduction of packed 16-bit counts, and the
    search ends as soon as a threshold keeps exactly ``budget`` keys.
    """
    live = keys > 0
    low = tl.min(tl.where(live, keys, 0xFFFFFFFF), axis=0)
    high = tl.max(keys, axis=0) + 1
    kept = tl.sum(live.to(tl.int32), axis=0)
    # Invariant: keys >= low are ``kept`` and at least budget; keys >= high are fewer than budget.
    while (kept > budget) & (high - low > 1):
        step = tl.maximum((high - low) // 5, 1)
        first = low + step
        second, third, fourth = first + step, first + 2 * step, first + 3 * step
        low_half = tl.where(keys >= second, 0x10001, tl.where(keys >= first, 1, 0))
        high_half = tl.where(keys >= fourth, 0x10001, tl.where(keys >= third, 1, 0))
        counts = tl.sum(low_half.to(tl.int64) | (high_half.to(tl.int64) << 32), axis=0)
        at_first, at_second = (counts & 0xFFFF).to(tl.int32), ((counts >> 16) & 0xFFFF).to(tl.int32)
        at_third, at_fourth = ((counts >> 32) & 0xFFFF).to(tl.int32), ((counts >> 48) & 0xFFFF).to(tl.int32)
        if at_second >= budget:
            if at_fourth >= budget:
                low, kept = fourth, at_fourth
            elif at_third >= budget:
                low, high, kept = third, fourth, at_third
            else:
                low, high, kept = second, third, at_second
        elif at_first >= budget:
            low, high, kept = first, second, at_first
        else:
            high = first
    threshold = low
    keep = live & (keys >= threshold)
    if kept > budget:
        level = keys == threshold
        surplus_from = tl.sum(level.to(tl.int32), axis=0) - (kept - budget)
        keep = keep & (~level | (tl.cumsum(level.to(tl.int32), axis=0) <= surplus_from))
    return keep


@triton.jit
def window_start(seq_len, window_tokens, PAGE: tl.constexpr):
    """First page that the window, or the current token, makes sure of."""
    return tl.maximum(tl.minimum(seq_len - window_tokens, seq_len - 1), 0) // PAGE


@triton.jit
def _page_keys(
    values_ptr, chunk_lse_ptr, score_stride, chunk_stride, offset, request, head, pages, live, num_pages,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
):  # fmt: skip
    """uint32 keys of ``pages``, ordered as their masses; 0 for those that are not ``live``.

    A mass is not negative, so its bits order as it does. Every segment of a row normalises in the
    same order, so equal masses stay equal.
    """
    group = tl.arange(0, GROUP_PAD)
    member = group < GROUP
    heads = (head * GROUP + group).to(tl.int64)
    # Loaded before anything waits.
    x = tl.load(values_ptr + heads[:, None] * score_stride + offset + pages[None, :],
                mask=member[:, None] & live[None, :], other=float("-inf"))  # fmt: skip
    chunk_row = chunk_lse_ptr + heads[:, None] * chunk_stride + offset // CHUNK + request
    num_chunks = (num_pages + CHUNK - 1) // CHUNK
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(0, num_chunks, CHUNK_BLOCK):
        chunks = (start + tl.arange(0, CHUNK_BLOCK))[None, :]
        part = tl.load(chunk_row + chunks, mask=member[:, None] & (chunks < num_chunks), other=float("-inf"))
        new_top = tl.where(member, tl.maximum(top, tl.max(part, axis=1)), 0.0)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(part - new_top[:, None]), axis=1)
        top = new_top
    norm = tl.where(member, top + tl.log(total), 0.0)
    mass = tl.sum(tl.exp(x - norm[:, None]), axis=0)
    # A mass that is no number counts as infinite.
    keys = tl.minimum(mass.to(tl.uint32, bitcast=True), 0x7F800000) + 1
    return tl.where(live, keys, 0).to(tl.uint32)


@triton.jit
def _choose(
    values_ptr, chunk_lse_ptr, block_row_ptr, score_stride, chunk_stride, offset, request, head, first, end,
    num_pages, per_block, head_start, quota,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys of ``WIDTH`` pages from ``first`` on, which are kept, places among those kept, and head pages."""
    pages = first + tl.arange(0, WIDTH)
    live = pages < end
    blocks = tl.load(block_row_ptr + pages, mask=live, other=0)
    keys = _page_keys(
        values_ptr, chunk_lse_ptr, score_stride, chunk_stride, offset, request, head, pages, live, num_pages,
        GROUP, GROUP_PAD,
    )  # fmt: skip
    keep = _keep_largest(keys, quota)
    return keys, keep, tl.cumsum(keep.to(tl.int32), axis=0) - 1, blocks * per_block + head_start


@triton.jit
def _store_chosen(head_pages_ptr, keys_ptr, place, head_page, key, keep, KEEP_KEYS: tl.constexpr):
    """Store the chosen pages of a row and, for the search of a ``top_p``, their keys."""
    tl.store(head_pages_ptr + place, head_page, mask=keep)
    if KEEP_KEYS:
        tl.store(keys_ptr + place, key, mask=keep)


@triton.jit
def _choose_alone(
    values_ptr, chunk_lse_ptr, block_row_ptr, score_stride, chunk_stride, offset, request, head, first, end,
    num_pages, per_block, head_start, quota, chosen_head_pages_ptr, chosen_keys_ptr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH: tl.constexpr, KEEP_KEYS: tl.constexpr,
):  # fmt: skip
    """Choose among all ranked pages of a row, at most ``WIDTH``."""
    keys, keep, place, head_page = _choose(
        values_ptr, chunk_lse_ptr, block_row_ptr, score_stride, chunk_stride, offset, request, head, first, end,
        num_pages, per_block, head_start, quota, GROUP, GROUP_PAD, WIDTH,
    )  # fmt: skip
    _store_chosen(chosen_head_pages_ptr, chosen_keys_ptr, place, head_page, keys, keep, KEEP_KEYS)


@triton.jit
def _store_candidates(keys_ptr, head_pages_ptr, first, place, head_page, keys, keep, BUDGET_PAD: tl.constexpr):
    """Store what a segment has kept from ``first`` on; keys of 0 fill up its ``BUDGET_PAD`` places."""
    empty = tl.arange(0, BUDGET_PAD)
    kept = tl.sum(keep.to(tl.int32), axis=0)
    tl.store(keys_ptr + first + empty, tl.zeros([BUDGET_PAD], tl.uint32), mask=empty >= kept)
    tl.store(keys_ptr + first + place, keys, mask=keep)
    tl.store(head_pages_ptr + first + place, head_page, mask=keep)


@triton.jit
def _merge_segments(
    candidate_keys_ptr, candidate_head_pages_ptr, count, quota, chosen_head_pages_ptr, chosen_keys_ptr,
    CANDIDATES: tl.constexpr, KEEP_KEYS: tl.constexpr,
):  # fmt: skip
    """Choose among what the segments of a row have kept, in the order of its pages."""
    lane = tl.arange(0, CANDIDATES)
    # Volatile: other multiprocessors wrote these while this one ran.
    keys = tl.load(candidate_keys_ptr + lane, mask=lane < count, other=0, volatile=True)
    head_page = tl.load(candidate_head_pages_ptr + lane, mask=lane < count, other=0, volatile=True)
    keep = _keep_largest(keys, quota)
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    _store_chosen(chosen_head_pages_ptr, chosen_keys_ptr, place, head_page, keys, keep, KEEP_KEYS)


@triton.jit
def _list_pages(table_row_ptr, block_row_ptr, num_pages, per_block, head_start, AT_ONCE: tl.constexpr):
    """Store the first ``num_pages`` pages of a row."""
    for start in range(0, num_pages, AT_ONCE):
        pages = start + tl.arange(0, AT_ONCE)
        blocks = tl.load(block_row_ptr + pages, mask=pages < num_pages, other=0)
        tl.store(table_row_ptr + pages, blocks * per_block + head_start, mask=pages < num_pages)


@triton.jit(do_not_specialize=["num_reqs", "segments"])
def _select_pages(
    values_ptr, chunk_lse_ptr, block_table_ptr, work_ptr, totals_ptr, budgets_ptr, arrivals_ptr, head_pages_ptr,
    keys_ptr, candidate_keys_ptr, candidate_head_pages_ptr, head_budget_pages_ptr, lengths_ptr, score_stride,
    chunk_stride, table_stride, table_stride_row, per_block, per_head, keys_stride, budget_pages, least_pages,
    sink_pages, window_tokens, segments, num_reqs,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, SMALL: tl.constexpr, ALONE: tl.constexpr, FORCED_PAD: tl.constexpr,
    BUDGET_PAD: tl.constexpr, CANDIDATES: tl.constexpr, KEEP_KEYS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    ends = first_ends(work_ptr, num_reqs, SEGMENT_ENDS)
    last_item = tl.load(totals_ptr + 3) * KV_HEADS
    while item < last_item:
        number, head = item // KV_HEADS, item % KV_HEADS
        listed = row_of(number, ends, work_ptr, num_reqs, SEGMENT_ENDS)
        request, seq_len, offset = entry_of(work_ptr, listed)
        segment = number - begin_of(work_ptr, listed, SEGMENT_ENDS)
        num_pages = (seq_len + PAGE - 1) // PAGE
        row, head_start = request * KV_HEADS + head, head * per_head
        table_row = head_pages_ptr + row.to(tl.int64) * table_stride_row
        key_row = keys_ptr + row.to(tl.int64) * keys_stride
        block_row = block_table_ptr + request.to(tl.int64) * table_stride
        if offset < 0:
            _list_pages(table_row, block_row, tl.where(offset == EVERY_PAGE, num_pages, 0), per_block, head_start,
                        SEGMENT)  # fmt: skip
        else:
            end = window_start(seq_len, window_tokens, PAGE)
            ranked = end - sink_pages
            chosen_head_pages, chosen_keys = table_row + sink_pages, key_row + sink_pages
            budget = row_budget(tl.load(budgets_ptr + request), budget_pages)
            pages_of_head = budget
            if head_budget_pages_ptr is not None:
                pages_of_head = share_of(tl.load(head_budget_pages_ptr + head), budget, budget_pages, least_pages)
            quota = pages_of_head - sink_pages - (num_pages - end)
            # The pages that are not ranked: loaded here and stored at the end, so that nothing waits for them.
            lane = tl.arange(0, FORCED_PAD)
            forced = tl.where(lane < sink_pages, lane, end + lane - sink_pages)
            is_forced = forced < tl.where(segment == 0, num_pages, 0)
            forced_blocks = tl.load(block_row + forced, mask=is_forced, other=0)
            if ranked <= SMALL:
                _choose_alone(
                    values_ptr, chunk_lse_ptr, block_row, score_stride, chunk_stride, offset, request, head,
                    sink_pages, end, num_pages, per_block, head_start, quota, chosen_head_pages, chosen_keys,
                    GROUP, GROUP_PAD, SMALL, KEEP_KEYS,
                )  # fmt: skip
            elif (ranked > SEGMENT) & (ranked <= ALONE):
                _choose_alone(
                    values_ptr, chunk_lse_ptr, block_row, score_stride, chunk_stride, offset, request, head,
                    sink_pages, end, num_pages, per_block, head_start, quota, chosen_head_pages, chosen_keys,
                    GROUP, GROUP_PAD, ALONE, KEEP_KEYS,
                )  # fmt: skip
            else:
                keys, keep, place, head_page = _choose(
                    values_ptr, chunk_lse_ptr, block_row, score_stride, chunk_stride, offset, request, head,
                    sink_pages + segment * SEGMENT, end, num_pages, per_block, head_start, quota,
                    GROUP, GROUP_PAD, SEGMENT,
                )  # fmt: skip
                if ranked <= SEGMENT:
                    _store_chosen(chosen_head_pages, chosen_keys, place, head_page, keys, keep, KEEP_KEYS)
                else:
                    row_segments = (ranked + SEGMENT - 1) // SEGMENT
                    first_found = row.to(tl.int64) * segments * BUDGET_PAD
                    _store_candidates(candidate_keys_ptr, candidate_head_pages_ptr,
                                      first_found + segment * BUDGET_PAD, place, head_page, keys, keep,
                                      BUDGET_PAD)  # fmt: skip
                    # All threads' stores, then one arrival that publishes them: whoever comes last merges.
                    tl.debug_barrier()
                    arrived = tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel")
                    if arrived == row_segments - 1:
                        tl.store(arrivals_ptr + row, 0)
                        _merge_segments(candidate_keys_ptr + first_found, candidate_head_pages_ptr + first_found,
                                        row_segments * BUDGET_PAD, quota, chosen_head_pages, chosen_keys,
                                        CANDIDATES, KEEP_KEYS)  # fmt: skip
            place = tl.where(lane < sink_pages, lane, lane + quota)
            tl.store(table_row + place, forced_blocks * per_block + head_start, mask=is_forced)
            if head_budget_pages_ptr is not None:
                tl.store(lengths_ptr + row, seq_len - (num_pages - pages_of_head) * PAGE, mask=segment == 0)
            if KEEP_KEYS:
                keys = _page_keys(values_ptr, chunk_lse_ptr, score_stride, chunk_stride, offset, request, head,
                                  forced, is_forced, num_pages, GROUP, GROUP_PAD)  # fmt: skip
                tl.store(key_row + place, keys | FORCED, mask=is_forced)
        item += tl.num_programs(0)


def select_pages(
    scores: PageScores,
    block_table: torch.Tensor,
    plan: DecodePlan,
    kv: torch.Tensor,
    selection: Selection,
    table: PageTable,
) -> None:
    """Fill the head pages of a decode step: chosen pages of scored rows, all of short ones, none of prompt tokens.

    Args:
        scores: what the policy wrote, ragged over requests (``plan.score_offsets``).
        block_table: int32 [num_reqs, max_pages].
        plan: this step's routing, and the budgets that its rows ask for.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim]; only its shape and strides are read.
        selection: pages to keep, sinks and window.
        table: [num_reqs * kv_heads] rows; ``plan_decode`` has filled its lengths. Rows that end at ``top_p``, and
            those of KV heads with budgets of their own, get new ones here.
    """
    num_reqs, max_pages = block_table.shape
    kv_heads = kv.shape[1]
    rows = num_reqs * kv_heads
    group = scores.q_heads // kv_heads
    # Rows within a budget are not scored, so one past the widest row is as good as any larger.
    budget_pages, page_size = min(selection.most_pages, max_pages), selection.page_size
    segment, segments = plan.segment_pages, triton.cdiv(max_pages, plan.segment_pages)
    budget_pad = triton.next_power_of_2(budget_pages)
    if budget_pages == max_pages:
        segments = budget_pad = 1
    assert segments * budget_pad <= MAX_CANDIDATES, f"{segments} segments with {budget_pages} pages each"
    shape = (rows, segments, budget_pad) if segments > 1 else (1,)
    candidate_keys = torch.empty(shape, dtype=torch.uint32, device=kv.device)
    candidate_head_pages = torch.empty(shape, dtype=torch.int32, device=kv.device)
    keep_keys, head_budget_pages = selection.top_p > 0, selection.head_budget_pages
    assert head_budget_pages is None or (head_budget_pages.shape == (kv_heads,) and not keep_keys)
    chosen_keys = torch.empty((rows, budget_pages) if keep_keys else (1, 1), dtype=torch.uint32, device=kv.device)
    grid = HeadPageGrid.of(kv)
    programs = PROGRAMS_PER_SM * num_multiprocessors(kv.device)
    _select_pages[(min(programs, rows * segments),)](
        scores.values, scores.chunk_lse, block_table, plan.work, plan.totals, plan.budgets, scores.arrivals,
        table.head_pages, chosen_keys, candidate_keys, candidate_head_pages,
        head_budget_pages, None if head_budget_pages is None else table.lengths,
        scores.values.stride(0), scores.chunk_lse.stride(0), block_table.stride(0), table.head_pages.stride(0),
        grid.per_block, grid.per_head, chosen_keys.stride(0), selection.budget_pages, selection.least_pages,
        selection.sink_pages, selection.window_tokens, segments, num_reqs,
        GROUP=group, GROUP_PAD=triton.next_power_of_2(group), KV_HEADS=kv_heads, PAGE=page_size,
        SEGMENT=segment, SMALL=min(segment, SMALL_PAGES), ALONE=plan.alone_pages,
        FORCED_PAD=triton.next_power_of_2(
            selection.sink_pages + triton.cdiv(selection.window_tokens, page_size) + 1
        ),
        BUDGET_PAD=budget_pad,
        CANDIDATES=triton.next_power_of_2(segments * budget_pad),
        KEEP_KEYS=keep_keys,
        num_warps=min(16, max(1, segment // TUNING["pages_per_warp"])),
    )  # fmt: skip
    if keep_keys:
        stop_at_top_p(chosen_keys, plan, kv_heads, group, selection, budget_pages, table)

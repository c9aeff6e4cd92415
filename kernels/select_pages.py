"""select_pages: scores of query heads to exactly ``budget`` pages per KV head.

    mass[p]  = sum_{g in group} softmax_p(score[g, p])
    chosen   = sinks, window and current page first, then the largest masses; ties to lower pages

Each head's scores are normalised over the pages of the request before the group is summed, so no
head outvotes the others by scale. Selection is exact: a search over the masses' integer images
finds the budget-th largest, a prefix sum writes the kept pages in ascending order. Rows of more
than one segment keep a budget of candidates per segment, then merge them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.launch import num_multiprocessors

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.page_scores import CHUNK_PAGES, PageScores
from vllm_sparse.page_table import PageTable, units_per_block

SEGMENT_PAGES = 4096
"""Most pages that one program selects from; the group's scores must fit its registers."""
SMALL_PAGES, MEDIUM_PAGES = 512, 2048
"""Contexts up to so many pages take smaller and faster copies of the same code."""
PROGRAMS_PER_SM = 2
CHUNK_BLOCK = 256
"""Entries of ``PageScores.chunk_lse`` read at a time."""


@triton.jit
def _keep_largest(keys, budget):
    """Mask of the ``budget`` largest keys, equal ones from the left; keys of 0 are never kept.

    Ternary search for a threshold: each round counts two candidates in one reduction of packed
    16-bit counts, and the search ends as soon as a threshold keeps exactly ``budget`` keys.
    """
    live = keys > 0
    low = tl.min(tl.where(live, keys, 0xFFFFFFFF), axis=0)
    high = tl.max(tl.where(keys < 0xFFFFFFFF, keys, 0), axis=0) + 1
    kept = tl.sum(live.to(tl.int32), axis=0)
    # Invariant: keys >= low are ``kept`` and at least budget; keys >= high are fewer than budget.
    while (kept > budget) & (high - low > 1):
        step = tl.maximum((high - low) // 3, 1)
        first, second = low + step, low + 2 * step
        packed = tl.where(keys >= second, 0x10001, tl.where(keys >= first, 1, 0))
        counts = tl.sum(packed, axis=0)
        at_first, at_second = counts & 0xFFFF, counts >> 16
        if at_second >= budget:
            low, kept = second, at_second
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
def _page_keys(
    values, chunk_lse, score_stride, chunk_stride, offset, request, head, first, num_pages,
    sink_pages, window_start,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    """uint32 keys of pages ``first .. first + SEGMENT`` of a (request, KV head), ordered as masses.

    A mass is not negative, so its bits order as it does; live pages are at least 1, forced ones
    the largest. Every segment of a row normalises in the same order, so equal masses stay equal.
    """
    group = tl.arange(0, GROUP_PAD)
    member = group < GROUP
    heads = (head * GROUP + group).to(tl.int64)
    pages = first + tl.arange(0, SEGMENT)
    live = pages < num_pages
    chunk_row = chunk_lse + heads[:, None] * chunk_stride + offset // CHUNK + request
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
    x = tl.load(values + heads[:, None] * score_stride + offset + pages[None, :],
                mask=member[:, None] & live[None, :], other=float("-inf"))  # fmt: skip
    mass = tl.sum(tl.exp(x - norm[:, None]), axis=0)
    forced = (pages < sink_pages) | (pages >= window_start)
    keys = tl.where(forced, 0xFFFFFFFF, mass.to(tl.uint32, bitcast=True) + 1)
    return tl.where(live, keys, 0).to(tl.uint32)


@triton.jit
def _select_row(
    values, chunk_lse, score_stride, chunk_stride, offset, request, head, num_pages,
    sink_pages, window_start, block_row, unit_row, units_per_block, budget,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose among all pages of one (request, KV head), at most ``SEGMENT``."""
    pages = tl.arange(0, SEGMENT)
    blocks = tl.load(block_row + pages, mask=pages < num_pages, other=0)
    keys = _page_keys(
        values, chunk_lse, score_stride, chunk_stride, offset, request, head, 0, num_pages,
        sink_pages, window_start, GROUP, GROUP_PAD, SEGMENT, CHUNK, CHUNK_BLOCK,
    )  # fmt: skip
    keep = _keep_largest(keys, budget)
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(unit_row + place, blocks * units_per_block + head, mask=keep)


@triton.jit
def _select_pages(
    values, chunk_lse, block_table, work, totals, units, candidate_keys, candidate_pages,
    score_stride, chunk_stride, table_stride, units_stride, units_per_block,
    budget, sink_pages, window_tokens, segments, num_reqs,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, SMALL: tl.constexpr, MEDIUM: tl.constexpr, BUDGET_PAD: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    # Segment by segment, so that rows of one segment, most rows, all go first.
    item, row_slots = tl.program_id(0), num_reqs * KV_HEADS
    listed = work + item % row_slots // KV_HEADS * 4
    # Read before it is known that there is such a row: one wait for memory less.
    request, seq_len, offset = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    end = tl.load(totals + 1) * KV_HEADS
    while item < row_slots * segments:
        slot, segment = item % row_slots, item // row_slots
        head = slot % KV_HEADS
        row = request * KV_HEADS + head
        num_pages = (seq_len + PAGE - 1) // PAGE
        first = segment * SEGMENT
        unit_row = units + row.to(tl.int64) * units_stride
        block_row = block_table + request.to(tl.int64) * table_stride
        window_start = tl.maximum(tl.minimum(seq_len - window_tokens, seq_len - 1), 0) // PAGE
        if slot >= end:
            pass
        elif offset < 0:
            if segment == 0:
                for start in range(0, num_pages, SMALL):
                    pages = start + tl.arange(0, SMALL)
                    blocks = tl.load(block_row + pages, mask=pages < num_pages, other=0)
                    tl.store(unit_row + pages, blocks * units_per_block + head, mask=pages < num_pages)
        elif num_pages <= SMALL:
            if segment == 0:
                _select_row(values, chunk_lse, score_stride, chunk_stride, offset, request, head, num_pages,
                            sink_pages, window_start, block_row, unit_row, units_per_block, budget,
                            GROUP, GROUP_PAD, SMALL, CHUNK, CHUNK_BLOCK)  # fmt: skip
        elif num_pages <= MEDIUM:
            if segment == 0:
                _select_row(values, chunk_lse, score_stride, chunk_stride, offset, request, head, num_pages,
                            sink_pages, window_start, block_row, unit_row, units_per_block, budget,
                            GROUP, GROUP_PAD, MEDIUM, CHUNK, CHUNK_BLOCK)  # fmt: skip
        elif num_pages <= SEGMENT:
            if segment == 0:
                _select_row(values, chunk_lse, score_stride, chunk_stride, offset, request, head, num_pages,
                            sink_pages, window_start, block_row, unit_row, units_per_block, budget,
                            GROUP, GROUP_PAD, SEGMENT, CHUNK, CHUNK_BLOCK)  # fmt: skip
        elif first < num_pages:
            keys = _page_keys(
                values, chunk_lse, score_stride, chunk_stride, offset, request, head, first, num_pages,
                sink_pages, window_start, GROUP, GROUP_PAD, SEGMENT, CHUNK, CHUNK_BLOCK,
            )  # fmt: skip
            keep = _keep_largest(keys, budget)
            index = tl.cumsum(keep.to(tl.int32), axis=0) - 1
            base = (row.to(tl.int64) * segments + segment) * BUDGET_PAD
            empty = tl.arange(0, BUDGET_PAD)
            kept = tl.sum(keep.to(tl.int32), axis=0)
            tl.store(candidate_keys + base + empty, tl.zeros([BUDGET_PAD], tl.uint32), mask=empty >= kept)
            tl.store(candidate_keys + base + index, keys, mask=keep)
            tl.store(candidate_pages + base + index, first + tl.arange(0, SEGMENT), mask=keep)
        item += tl.num_programs(0)
        slot = item % row_slots
        listed = work + slot // KV_HEADS * 4
        request = tl.load(listed, mask=slot < end, other=0)
        seq_len = tl.load(listed + 1, mask=slot < end, other=0)
        offset = tl.load(listed + 2, mask=slot < end, other=0)


@triton.jit
def _merge_segments(
    block_table, work, totals, units, candidate_keys, candidate_pages,
    table_stride, units_stride, units_per_block, budget, segments,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, BUDGET_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), tl.load(totals) * KV_HEADS, tl.num_programs(0)):
        listed, head = work + item // KV_HEADS * 4, item % KV_HEADS
        request, seq_len = tl.load(listed), tl.load(listed + 1)
        row = request * KV_HEADS + head
        num_pages = (seq_len + PAGE - 1) // PAGE
        if num_pages > SEGMENT:
            lane = tl.arange(0, BLOCK)
            live = lane < (num_pages + SEGMENT - 1) // SEGMENT * BUDGET_PAD
            base = row.to(tl.int64) * segments * BUDGET_PAD
            keys = tl.load(candidate_keys + base + lane, mask=live, other=0)
            keep = _keep_largest(keys, budget)
            place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
            pages = tl.load(candidate_pages + base + lane, mask=keep, other=0)
            blocks = tl.load(block_table + request.to(tl.int64) * table_stride + pages, mask=keep, other=0)
            unit_row = units + row.to(tl.int64) * units_stride
            tl.store(unit_row + place, blocks * units_per_block + head, mask=keep)


def select_pages(
    scores: PageScores,
    block_table: torch.Tensor,
    plan: DecodePlan,
    kv: torch.Tensor,
    page_size: int,
    budget_pages: int,
    sink_pages: int,
    window_tokens: int,
    table: PageTable,
) -> None:
    """Fill the units of a decode step: chosen pages of scored rows, every page of short ones.

    Args:
        scores: what the policy wrote, ragged over requests (``plan.score_offsets``).
        block_table: int32 [num_reqs, max_pages].
        plan: this step's routing.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim]; only its shape and strides are read.
        page_size: tokens per page.
        budget_pages: pages kept of a scored row.
        sink_pages, window_tokens: first pages and last tokens that are always kept.
        table: [num_reqs * kv_heads] rows; ``plan_decode`` has filled its lengths.
    """
    num_reqs, max_pages = block_table.shape
    kv_heads = kv.shape[1]
    rows = num_reqs * kv_heads
    group = scores.q_heads // kv_heads
    group_pad = triton.next_power_of_2(group)
    segment = min(SEGMENT_PAGES, max(16, triton.next_power_of_2(max_pages)))
    segments = triton.cdiv(max_pages, segment)
    budget_pad = triton.next_power_of_2(budget_pages)
    shape = (rows, segments, budget_pad) if segments > 1 else (1,)
    candidate_keys = torch.empty(shape, dtype=torch.uint32, device=kv.device)
    candidate_pages = torch.empty(shape, dtype=torch.int32, device=kv.device)
    programs = PROGRAMS_PER_SM * num_multiprocessors(kv.device)
    _select_pages[(min(programs, rows * segments),)](
        scores.values, scores.chunk_lse, block_table, plan.work, plan.totals,
        table.units, candidate_keys, candidate_pages,
        scores.values.stride(0), scores.chunk_lse.stride(0), block_table.stride(0), table.units.stride(0),
        units_per_block(kv), budget_pages, sink_pages, window_tokens, segments, num_reqs,
        GROUP=group, GROUP_PAD=group_pad, KV_HEADS=kv_heads, PAGE=page_size, SEGMENT=segment,
        SMALL=min(segment, SMALL_PAGES), MEDIUM=min(segment, MEDIUM_PAGES), BUDGET_PAD=budget_pad,
        CHUNK=CHUNK_PAGES, CHUNK_BLOCK=CHUNK_BLOCK, num_warps=min(16, max(1, segment // 64)),
    )  # fmt: skip
    if segments > 1:
        block = triton.next_power_of_2(segments * budget_pad)
        _merge_segments[(min(programs, rows),)](
            block_table, plan.work, plan.totals, table.units, candidate_keys, candidate_pages,
            block_table.stride(0), table.units.stride(0), units_per_block(kv), budget_pages, segments,
            KV_HEADS=kv_heads, PAGE=page_size, SEGMENT=segment, BUDGET_PAD=budget_pad, BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip

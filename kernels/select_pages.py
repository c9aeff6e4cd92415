"""select_pages: scores of query heads to exactly ``budget`` pages per KV head.

    mass[p]  = log sum_{g in group} exp(score[g, p] - logsumexp_p' score[g, p'])
    chosen   = sinks, window and current page first, then the largest masses; ties to lower pages

Each head's scores are normalised over the pages of the request before the group is summed, so no
head outvotes the others by scale. Selection is exact: masses become order-preserving integers, a
bitwise search finds the budget-th largest, a prefix sum writes the kept pages in ascending order.
Rows of more than one segment keep a budget of candidates per segment, then merge them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.page_table import PageTable, units_per_block

SEGMENT_PAGES = 4096


@triton.jit
def _order_key(x):
    """float32 to uint32 whose unsigned order is the float's; every real number is above 0."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def _keep_largest(keys, budget):
    """Mask of the ``budget`` largest keys, equal ones from the left; keys of 0 are never kept."""
    threshold = tl.zeros([], tl.uint32)
    for shift in tl.static_range(31, -1, -1):
        candidate = threshold | (1 << shift)
        count = tl.sum((keys >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= budget, candidate, threshold)
    above = keys > threshold
    level = (keys == threshold) & (keys > 0)
    open_places = budget - tl.sum(above.to(tl.int32), axis=0)
    return above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= open_places))


@triton.jit
def _select_pages(
    scores, block_table, seq_lens, score_offsets, units, lengths, candidate_keys, candidate_pages,
    score_stride, table_stride, units_stride, units_per_block, budget, sink_pages, window_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr,
    BUDGET_PAD: tl.constexpr,
):  # fmt: skip
    row, segment = tl.program_id(0), tl.program_id(1)
    request, head = row // KV_HEADS, row % KV_HEADS
    seq_len = tl.load(seq_lens + request)
    offset = tl.load(score_offsets + request)
    num_pages = (seq_len + PAGE - 1) // PAGE
    lane = tl.arange(0, SEGMENT)
    unit_row = units + row.to(tl.int64) * units_stride
    block_row = block_table + request.to(tl.int64) * table_stride
    if offset < 0:
        # Short context, or a row that is not of this table (length 0).
        if segment == 0:
            tl.store(lengths + row, seq_len)
            for start in range(0, num_pages, SEGMENT):
                pages = start + lane
                blocks = tl.load(block_row + pages, mask=pages < num_pages, other=0)
                tl.store(unit_row + pages, blocks * units_per_block + head, mask=pages < num_pages)
        return
    first = segment * SEGMENT
    if first >= num_pages:
        return
    pages = first + lane
    live = pages < num_pages
    share = tl.zeros([SEGMENT], tl.float32)
    peak = tl.full([SEGMENT], float("-inf"), tl.float32)
    for g in tl.static_range(GROUP):
        score_row = scores + (head * GROUP + g).to(tl.int64) * score_stride + offset
        top = tl.full([SEGMENT], float("-inf"), tl.float32)
        total = tl.zeros([SEGMENT], tl.float32)
        for start in range(0, num_pages, SEGMENT):
            x = tl.load(score_row + start + lane, mask=start + lane < num_pages, other=float("-inf"))
            new_top = tl.maximum(top, x)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.exp(x - base)
            top = new_top
        highest = tl.max(top, axis=0)
        norm = tl.log(tl.sum(total * tl.exp(top - highest), axis=0)) + highest
        x = tl.load(score_row + pages, mask=live, other=float("-inf")) - norm
        new_peak = tl.maximum(peak, x)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        share = share * tl.exp(peak - base) + tl.exp(x - base)
        peak = new_peak
    mass = tl.log(share) + peak
    window_start = tl.maximum(tl.minimum(seq_len - window_tokens, seq_len - 1), 0) // PAGE
    forced = (pages < sink_pages) | (pages >= window_start)
    keys = tl.where(forced, 0xFFFFFFFF, _order_key(mass))
    keys = tl.where(live, keys, 0).to(tl.uint32)
    keep = _keep_largest(keys, budget)
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    if num_pages <= SEGMENT:
        blocks = tl.load(block_row + pages, mask=keep, other=0)
        tl.store(unit_row + place, blocks * units_per_block + head, mask=keep)
        tl.store(lengths + row, seq_len - (num_pages - budget) * PAGE)
    else:
        base = (row.to(tl.int64) * tl.num_programs(1) + segment) * BUDGET_PAD
        empty = tl.arange(0, BUDGET_PAD)
        kept = tl.sum(keep.to(tl.int32), axis=0)
        tl.store(candidate_keys + base + empty, tl.zeros([BUDGET_PAD], tl.uint32), mask=empty >= kept)
        tl.store(candidate_keys + base + place, keys, mask=keep)
        tl.store(candidate_pages + base + place, pages, mask=keep)


@triton.jit
def _merge_segments(
    block_table, seq_lens, score_offsets, units, lengths, candidate_keys, candidate_pages,
    table_stride, units_stride, units_per_block, budget, num_segments,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, BUDGET_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    request, head = row // KV_HEADS, row % KV_HEADS
    seq_len = tl.load(seq_lens + request)
    num_pages = (seq_len + PAGE - 1) // PAGE
    if (tl.load(score_offsets + request) < 0) | (num_pages <= SEGMENT):
        return
    lane = tl.arange(0, BLOCK)
    live = lane < (num_pages + SEGMENT - 1) // SEGMENT * BUDGET_PAD
    base = row.to(tl.int64) * num_segments * BUDGET_PAD
    keys = tl.load(candidate_keys + base + lane, mask=live, other=0)
    keep = _keep_largest(keys, budget)
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    pages = tl.load(candidate_pages + base + lane, mask=keep, other=0)
    blocks = tl.load(block_table + request.to(tl.int64) * table_stride + pages, mask=keep, other=0)
    unit_row = units + row.to(tl.int64) * units_stride
    tl.store(unit_row + place, blocks * units_per_block + head, mask=keep)
    tl.store(lengths + row, seq_len - (num_pages - budget) * PAGE)


def select_pages(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    kv: torch.Tensor,
    page_size: int,
    budget_pages: int,
    sink_pages: int,
    window_tokens: int,
    table: PageTable,
) -> None:
    """Fill the page table of a decode step: chosen pages of scored rows, every page of short ones.

    Args:
        scores: float32 [q_heads, capacity_pages], ragged over requests (``plan.score_offsets``).
        block_table: int32 [num_reqs, max_pages].
        plan: this step's routing.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim]; only its shape and strides are read.
        page_size: tokens per page.
        budget_pages: pages kept of a scored row.
        sink_pages, window_tokens: first pages and last tokens that are always kept.
        table: [num_reqs * kv_heads] rows, overwritten.
    """
    num_reqs, max_pages = block_table.shape
    kv_heads = kv.shape[1]
    rows = num_reqs * kv_heads
    segment = min(SEGMENT_PAGES, max(16, triton.next_power_of_2(max_pages)))
    segments = triton.cdiv(max_pages, segment)
    budget_pad = triton.next_power_of_2(budget_pages)
    shape = (rows, segments, budget_pad) if segments > 1 else (1,)
    candidate_keys = torch.empty(shape, dtype=torch.uint32, device=scores.device)
    candidate_pages = torch.empty(shape, dtype=torch.int32, device=scores.device)
    _select_pages[(rows, segments)](
        scores, block_table, plan.table_seq_lens, plan.score_offsets, table.units, table.lengths,
        candidate_keys, candidate_pages,
        scores.stride(0), block_table.stride(0), table.units.stride(0), units_per_block(kv),
        budget_pages, sink_pages, window_tokens,
        GROUP=scores.shape[0] // kv_heads, KV_HEADS=kv_heads, PAGE=page_size, SEGMENT=segment,
        BUDGET_PAD=budget_pad, num_warps=min(16, max(1, segment // 256)),
    )  # fmt: skip
    if segments > 1:
        block = triton.next_power_of_2(segments * budget_pad)
        _merge_segments[(rows,)](
            block_table, plan.table_seq_lens, plan.score_offsets, table.units, table.lengths,
            candidate_keys, candidate_pages,
            block_table.stride(0), table.units.stride(0), units_per_block(kv), budget_pages, segments,
            KV_HEADS=kv_heads, PAGE=page_size, SEGMENT=segment, BUDGET_PAD=budget_pad, BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip

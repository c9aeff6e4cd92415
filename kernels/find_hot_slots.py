"""find_hot_slots: which head pages of a decode step's page table the hot set holds.

    head_pages[row, p] = first_head_page + slot_of[head page]   where the hot set holds it
                         ~head page                             where it does not
                         staging pages of the request           for the last pages, which this step has written

The hot slot of a head page that is held is stamped as used now; the place of one that is not is listed among
the misses. Hot slots that a step needs are all stamped before :mod:`vllm_sparse.kernels.fetch_head_pages` gives
any away.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse.kernels.constants import WHOLE
from vllm_sparse.kernels.query_tokens import span_of
from vllm_sparse.pages.hot_set import HotSet, Lookups
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan

BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit(do_not_specialize=["layer"])
def _find_hot_slots(
    head_pages_ptr, lengths_ptr, routes_ptr, starts_ptr, staged_slots_ptr, clock_ptr, slot_of_ptr, last_use_ptr,
    misses_ptr, num_misses_ptr, counters_ptr, table_stride_row, first_head_page, layer,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + row)
    num_pages = (length + PAGE - 1) // PAGE
    if part * BLOCK >= num_pages:
        return
    request, head = row // KV_HEADS, row % KV_HEADS
    if routes_ptr is not None:  # noqa: SIM102  settled when the kernel is compiled
        if tl.load(routes_ptr + request) == WHOLE:
            return
    token, count = span_of(starts_ptr, request)
    old_pages = tl.maximum(length - count, 0) // PAGE
    place = part * BLOCK + tl.arange(0, BLOCK)
    written = (place >= old_pages) & (place < num_pages)
    wanted = place < old_pages
    at = row * table_stride_row + place
    head_page = tl.load(head_pages_ptr + at, mask=wanted, other=0)
    slot = tl.load(slot_of_ptr + head_page, mask=wanted, other=-1)
    held = wanted & (slot >= 0)
    missing = wanted & (slot < 0)
    now = tl.load(clock_ptr)
    tl.store(last_use_ptr + slot, tl.zeros([BLOCK], tl.int32) + now, mask=held)
    # A row that is padded, or of a dummy run, was not written; its output is never read.
    staged = tl.maximum(tl.load(staged_slots_ptr + token), 0).to(tl.int32) // PAGE + place - old_pages
    found = tl.where(written, staged * KV_HEADS + head, tl.where(held, first_head_page + slot, ~head_page))
    tl.store(head_pages_ptr + at, found, mask=wanted | written)
    misses = tl.sum(missing.to(tl.int32), axis=0)
    if misses > 0:
        start = tl.atomic_add(num_misses_ptr + layer, misses)
        tl.store(misses_ptr + start + tl.cumsum(missing.to(tl.int32), axis=0) - 1, at, mask=missing)
    tl.atomic_add(counters_ptr, tl.sum(wanted.to(tl.int64), axis=0))


def find_hot_slots(
    table: PageTable,
    kv_heads: int,
    page_size: int,
    plan: WritePlan,
    layer: int,
    hot_set: HotSet,
    lookups: Lookups,
) -> None:
    """Turn head pages of the host pool into head pages of the hot store, in place, and list those that it lacks.

    Args:
        table: a decode step's chosen pages; row ``request * kv_heads + head``. Rows that it does not list stay as
            they are.
        kv_heads, page_size: of the cache.
        plan: this step's writes and time.
        layer: position among the layers of this rank.
        hot_set: the layer's.
        lookups: ``misses`` gets ``plan.num_misses[layer]`` places in ``table.head_pages``; head pages looked for
            are added to the first of ``counters``.
    """
    rows, width = table.head_pages.shape
    if rows == 0:
        return
    assert table.head_pages.stride(0) == width and lookups.misses.shape[0] >= rows * width
    _find_hot_slots[(rows, triton.cdiv(width, BLOCK.value))](
        table.head_pages, table.lengths, table.routes, table.queries.starts, plan.staged_slots, plan.clock,
        hot_set.slot_of, hot_set.last_use, lookups.misses, plan.num_misses, lookups.counters, width,
        hot_set.first_head_page, layer,
        KV_HEADS=kv_heads, PAGE=page_size, num_warps=1,
    )  # fmt: skip

"""fetch_head_pages: missing head pages of a decode step, from pinned host memory into hot slots.

    set(head page) = (head page * 2654435761 mod 2^32) * num_sets / 2^32             16 hot slots
    hot slot       = the least recently used of the set that this step does not need

Each program claims a hot slot by a compare-and-swap of its time of last use and copies one head page, so there is
no host code, no lock and no wait for other programs. Where this step needs all 16 hot slots of a set the place
keeps ``~head_page`` and the attention kernel reads the head page on the host. Two requests that share a page may
both fetch it in the same step; the map then knows one of the copies, and the other ages away.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import bytes_of, from_e4m3, powers_256_of
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.pages import hot_set as hot_sets
from vllm_sparse.pages.hot_set import HotSet, Lookups
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan

HASH: tl.constexpr = tl.constexpr(hot_sets.HASH)
WAYS: tl.constexpr = tl.constexpr(hot_sets.WAYS)
TUNING = {"programs_per_sm": 2, "block": 4096}


@triton.jit(do_not_specialize=["layer", "num_sets"])
def _fetch_head_pages(
    host_ptr, exponents_ptr, hot_ptr, head_pages_ptr, clock_ptr, slot_of_ptr, slot_head_page_ptr, last_use_ptr,
    misses_ptr, num_misses_ptr, counters_ptr, host_stride_u, hot_stride_u, first_head_page, layer, num_sets,
    HEAD_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(num_misses_ptr + layer)
    item = tl.program_id(0)
    if item >= count:
        return
    now = tl.load(clock_ptr)
    ways = tl.arange(0, WAYS)
    fetched, in_place = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    while item < count:
        at = tl.load(misses_ptr + item)
        head_page = ~tl.load(head_pages_ptr + at)
        first = (((head_page.to(tl.int64) * HASH) & 0xFFFFFFFF) * num_sets >> 32).to(tl.int32) * WAYS
        slot = -1
        searching = num_sets > 0
        while searching:
            # Volatile: other programs claim slots of the same set meanwhile.
            ages = tl.load(last_use_ptr + first + ways, volatile=True)
            oldest = tl.min(ages, axis=0)
            if oldest >= now:
                searching = False
            else:
                way = tl.min(tl.where(ages == oldest, ways, WAYS), axis=0)
                if tl.atomic_cas(last_use_ptr + first + way, oldest, now) == oldest:
                    slot = first + way
                    searching = False
        if slot >= 0:
            old = tl.load(slot_head_page_ptr + slot)
            if tl.load(slot_of_ptr + old, mask=old >= 0, other=-1) == slot:
                tl.store(slot_of_ptr + old, -1)
            tl.store(slot_head_page_ptr + slot, head_page)
            tl.store(slot_of_ptr + head_page, slot)
            source = host_ptr + head_page.to(tl.int64) * host_stride_u
            target = hot_ptr + (first_head_page + slot).to(tl.int64) * hot_stride_u
            for start in range(0, HEAD_PAGE, BLOCK):
                cells = start + tl.arange(0, BLOCK)
                kv = tl.load(source + cells, mask=cells < HEAD_PAGE)
                if exponents_ptr is not None:
                    powers = powers_256_of(exponents_ptr, head_page.to(tl.int64), (cells // HEAD_DIM) % 2 == 1)
                    kv = from_e4m3(kv, powers)
                tl.store(target + cells, kv.to(hot_ptr.dtype.element_ty), mask=cells < HEAD_PAGE)
            tl.store(head_pages_ptr + at, first_head_page + slot)
            fetched += 1
        else:
            in_place += 1
        item += tl.num_programs(0)
    tl.atomic_add(counters_ptr + 1, fetched)
    tl.atomic_add(counters_ptr + 2, in_place)


def fetch_head_pages(
    host: torch.Tensor,
    table: PageTable,
    plan: WritePlan,
    layer: int,
    hot_set: HotSet,
    lookups: Lookups,
    hot: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    """Fetch what :mod:`vllm_sparse.kernels.find_hot_slots` found missing, and put its place into the table.

    Args:
        host: [num_blocks, kv_heads, page_size, 2 * head_dim], pinned.
        table: as ``find_hot_slots`` left it.
        plan, layer, hot_set: as given to it.
        lookups: with its misses; head pages fetched, and those left on the host, are added to the second and third
            of ``counters``.
        hot: [pages, kv_heads, page_size + summary slots, 2 * head_dim].
        exponents: uint8 [num_blocks, kv_heads, 2], where ``host`` is e4m3 (:mod:`vllm_sparse.kernels.e4m3`).
    """
    _, kv_heads, page_size, content = host.shape
    assert host.stride(2) == hot.stride(2) == content and host.stride(3) == hot.stride(3) == 1
    assert HeadPageGrid.of(host).per_block == HeadPageGrid.of(hot).per_block == kv_heads
    most = table.head_pages.numel()
    if most == 0:
        return
    head_page = page_size * content
    programs = min(most, TUNING["programs_per_sm"] * num_multiprocessors(hot.device))
    _fetch_head_pages[(programs,)](
        bytes_of(host), exponents, bytes_of(hot), table.head_pages, plan.clock, hot_set.slot_of,
        hot_set.slot_head_page, hot_set.last_use, lookups.misses, plan.num_misses, lookups.counters,
        host.stride(1), hot.stride(1),
        hot_set.first_head_page, layer, hot_set.num_sets, HEAD_PAGE=head_page, HEAD_DIM=content // 2,
        BLOCK=min(TUNING["block"], triton.next_power_of_2(head_page)),
        # One: warps that each read the ages of a set, while other programs claim its slots, would choose
        # different ones.
        num_warps=1,
    )  # fmt: skip

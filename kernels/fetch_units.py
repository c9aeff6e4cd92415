"""fetch_units: missing units of a decode step, from pinned host memory into slots.

    set(unit) = (unit * 2654435761 mod 2^32) * num_sets / 2^32             16 slots
    slot      = the least recently used of the set that this step does not need

Each program claims a slot by a compare-and-swap of its time of last use and copies one unit, so there is
no host code, no lock and no wait for other programs. Where this step needs all 16 slots of a set the place
keeps ``~unit`` and the engine reads the unit on the host. Two requests that share a page may both fetch it
in the same step; the map then knows one of the copies, and the other ages away.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import codes_of, from_e4m3, powers_256_of
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.offload.sizing import WAYS
from vllm_sparse.pages.hot_set import HASH, Residency
from vllm_sparse.pages.layout import UnitGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan

TUNING = {"programs_per_sm": 2, "block": 4096}


@triton.jit(do_not_specialize=["layer", "num_sets"])
def _fetch_units(
    host, exponents, hot, units, clock, slot_of, slot_unit, last_use, misses, num_misses, counters,
    host_stride_u, hot_stride_u, first_unit, layer, num_sets,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, HASH: tl.constexpr,
):  # fmt: skip
    count = tl.load(num_misses + layer)
    item = tl.program_id(0)
    if item >= count:
        return
    now = tl.load(clock)
    ways = tl.arange(0, WAYS)
    fetched, in_place = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    while item < count:
        at = tl.load(misses + item)
        unit = ~tl.load(units + at)
        first = (((unit.to(tl.int64) * HASH) & 0xFFFFFFFF) * num_sets >> 32).to(tl.int32) * WAYS
        slot = -1
        searching = num_sets > 0
        while searching:
            # Volatile: other programs claim slots of the same set meanwhile.
            ages = tl.load(last_use + first + ways, volatile=True)
            oldest = tl.min(ages, axis=0)
            if oldest >= now:
                searching = False
            else:
                way = tl.min(tl.where(ages == oldest, ways, WAYS), axis=0)
                if tl.atomic_cas(last_use + first + way, oldest, now) == oldest:
                    slot = first + way
                    searching = False
        if slot >= 0:
            old = tl.load(slot_unit + slot)
            if tl.load(slot_of + old, mask=old >= 0, other=-1) == slot:
                tl.store(slot_of + old, -1)
            tl.store(slot_unit + slot, unit)
            tl.store(slot_of + unit, slot)
            source = host + unit.to(tl.int64) * host_stride_u
            target = hot + (first_unit + slot).to(tl.int64) * hot_stride_u
            for start in range(0, UNIT, BLOCK):
                cells = start + tl.arange(0, BLOCK)
                kv = tl.load(source + cells, mask=cells < UNIT)
                if exponents is not None:
                    powers = powers_256_of(exponents, unit.to(tl.int64), (cells // HEAD_DIM) % 2 == 1)
                    kv = from_e4m3(kv, powers)
                tl.store(target + cells, kv.to(hot.dtype.element_ty), mask=cells < UNIT)
            tl.store(units + at, first_unit + slot)
            fetched += 1
        else:
            in_place += 1
        item += tl.num_programs(0)
    tl.atomic_add(counters + 1, fetched)
    tl.atomic_add(counters + 2, in_place)


def fetch_units(
    host: torch.Tensor,
    table: PageTable,
    plan: WritePlan,
    layer: int,
    residency: Residency,
    misses: torch.Tensor,
    hot: torch.Tensor,
    counters: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    """Fetch what :mod:`vllm_sparse.kernels.find_slots` found missing, and put its place into the table.

    Args:
        host: [num_blocks, kv_heads, page_size, 2 * head_dim], pinned.
        table: as ``find_slots`` left it.
        plan, layer, residency, misses: as given to it.
        hot: [pages, kv_heads, page_size + summary rows, 2 * head_dim].
        counters: int64 [3]: units fetched and units left on the host are added to the second and third.
        exponents: uint8 [num_blocks, kv_heads, 2], where ``host`` is e4m3 (:mod:`vllm_sparse.kernels.e4m3`).
    """
    _, kv_heads, page_size, content = host.shape
    assert host.stride(2) == hot.stride(2) == content and host.stride(3) == hot.stride(3) == 1
    assert UnitGrid.of(host).per_block == UnitGrid.of(hot).per_block == kv_heads
    most = table.units.numel()
    if most == 0:
        return
    unit = page_size * content
    programs = min(most, TUNING["programs_per_sm"] * num_multiprocessors(hot.device))
    _fetch_units[(programs,)](
        codes_of(host, exponents), exponents, hot, table.units, plan.clock, residency.slot_of,
        residency.slot_unit, residency.last_use, misses, plan.num_misses, counters, host.stride(1), hot.stride(1),
        residency.first_unit, layer, residency.num_sets, UNIT=unit, HEAD_DIM=content // 2,
        BLOCK=min(TUNING["block"], triton.next_power_of_2(unit)), WAYS=WAYS, HASH=HASH,
        # One: warps that each read the ages of a set, while other programs claim its slots, would choose
        # different ones.
        num_warps=1,
    )  # fmt: skip

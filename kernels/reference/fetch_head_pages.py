"""Reference of :mod:`vllm_sparse.kernels.fetch_head_pages`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import kept
from vllm_sparse.pages.hot_set import HASH, WAYS, HotSet, Lookups
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan


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
    heads, page_size = host.shape[1], host.shape[2]
    head_pages, now = table.head_pages.view(-1), int(plan.clock)
    for at in lookups.misses[: int(plan.num_misses[layer])].tolist():
        head_page = ~int(head_pages[at])
        first = ((head_page * HASH & 0xFFFFFFFF) * hot_set.num_sets >> 32) * WAYS
        ages = hot_set.last_use[first : first + WAYS]
        if not len(ages) or int(ages.min()) >= now:
            lookups.counters[2] += 1
            continue
        slot = first + int(ages.argmin())
        hot_set.last_use[slot] = now
        old = int(hot_set.slot_head_page[slot])
        if old >= 0 and int(hot_set.slot_of[old]) == slot:
            hot_set.slot_of[old] = -1
        hot_set.slot_head_page[slot] = head_page
        hot_set.slot_of[head_page] = slot
        place = hot_set.first_head_page + slot
        block, head = divmod(head_page, heads)
        hot[place // heads, place % heads, :page_size] = kept(host, exponents, block, hot.dtype)[head]
        head_pages[at] = place
        lookups.counters[1] += 1

"""Reference of :mod:`vllm_sparse.kernels.find_hot_slots`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import WHOLE
from vllm_sparse.pages.hot_set import HotSet, Lookups
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan


def find_hot_slots(
    table: PageTable,
    kv_heads: int,
    page_size: int,
    plan: WritePlan,
    layer: int,
    hot_set: HotSet,
    lookups: Lookups,
) -> None:
    width, missing = table.head_pages.shape[1], []
    spans = table.queries.spans(table.lengths.shape[0] // kv_heads)
    for row, length in enumerate(table.lengths.tolist()):
        if length == 0:
            continue
        request, head = divmod(row, kv_heads)
        if table.routes is not None and table.routes[request] == WHOLE:
            continue
        token, count = spans[request]
        pages, old_pages = -(-length // page_size), max(length - count, 0) // page_size
        head_pages = table.head_pages[row, :old_pages].clone()
        slots = hot_set.slot_of[head_pages.long()]
        hit = slots >= 0
        hot_set.last_use[slots[hit].long()] = plan.clock
        table.head_pages[row, :old_pages] = torch.where(hit, hot_set.first_head_page + slots, ~head_pages)
        staged = max(int(plan.staged_slots[token]), 0) // page_size
        written = torch.arange(staged, staged + pages - old_pages, device=head_pages.device)
        table.head_pages[row, old_pages:pages] = (written * kv_heads + head).int()
        missing.append(row * width + torch.nonzero(~hit).squeeze(1))
        lookups.counters[0] += old_pages
    if missing:
        missing = torch.cat(missing)
        first = int(plan.num_misses[layer])
        lookups.misses[first : first + len(missing)] = missing.int()
        plan.num_misses[layer] += len(missing)

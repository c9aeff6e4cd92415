"""Plain-torch references of the offload launchers, same names and signatures; see :mod:`reference`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import WHOLE
from vllm_sparse.pages.hot_set import HASH, WAYS, HotSet
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan


def plan_writes(slot_mapping: torch.Tensor, page_size: int, plan: WritePlan) -> None:
    slots = slot_mapping.long()
    written, block, row = slots >= 0, slots // page_size, slots % page_size
    marked = torch.where(written, block, -1)
    before = torch.cat([marked.new_full((1,), -2), marked[:-1]])
    after = torch.cat([marked[1:], marked.new_full((1,), -2)])
    starts, ends = written & (before != marked), written & (after != marked)
    staged = starts.cumsum(0) - 1
    plan.staged_slots[: len(slots)] = torch.where(written, staged * page_size + row, -1)
    count = int(starts.sum())
    plan.blocks[:count] = block[starts].int()
    plan.first_row[:count] = row[starts].int()
    plan.end_row[:count] = row[ends].int() + 1
    plan.num_pages.fill_(count)
    plan.clock += 1
    plan.num_misses.zero_()


def stage_pages(
    host: torch.Tensor,
    summaries: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    hot: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    for page, block, first, _ in _staged(plan):
        hot[page, :, :first] = kept(host, exponents, block, hot.dtype)[:, :first]
        if first:
            hot[page, :, host.shape[2] :] = summaries[block]


def write_through(
    hot: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    host: torch.Tensor,
    summaries: torch.Tensor,
    hot_set: HotSet,
    exponents: torch.Tensor | None = None,
) -> None:
    heads, page_size = host.shape[1], host.shape[2]
    for page, block, first, end in _staged(plan):
        if exponents is None:
            host[block, :, first:end] = hot[page, :, first:end]
        else:
            host[block, :, :end], exponents[block] = to_e4m3(hot[page, :, :end])
        summaries[block] = hot[page, :, page_size:]
        head_pages = slice(block * heads, (block + 1) * heads)
        slots = hot_set.slot_of[head_pages].long()
        slots = slots[slots >= 0]
        hot_set.slot_head_page[slots] = -1
        hot_set.last_use[slots] = 0
        hot_set.slot_of[head_pages] = -1


def find_hot_slots(
    table: PageTable,
    kv_heads: int,
    page_size: int,
    plan: WritePlan,
    layer: int,
    hot_set: HotSet,
    misses: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    width, missing = table.head_pages.shape[1], []
    for row, length in enumerate(table.lengths.tolist()):
        if length == 0:
            continue
        request, head = divmod(row, kv_heads)
        if table.routes is not None and table.routes[request] == WHOLE:
            continue
        pages = -(-length // page_size)
        head_pages = table.head_pages[row, :pages].clone()
        slots = hot_set.slot_of[head_pages[:-1].long()]
        hit = slots >= 0
        hot_set.last_use[slots[hit].long()] = plan.clock
        table.head_pages[row, : pages - 1] = torch.where(hit, hot_set.first_head_page + slots, ~head_pages[:-1])
        staged = int(plan.staged_slots[request]) // page_size
        table.head_pages[row, pages - 1] = max(staged, 0) * kv_heads + head
        missing.append(row * width + torch.nonzero(~hit).squeeze(1))
        counters[0] += pages - 1
    if missing:
        missing = torch.cat(missing)
        misses[: len(missing)] = missing.int()
        plan.num_misses[layer] = len(missing)


def fetch_head_pages(
    host: torch.Tensor,
    table: PageTable,
    plan: WritePlan,
    layer: int,
    hot_set: HotSet,
    misses: torch.Tensor,
    hot: torch.Tensor,
    counters: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    heads, page_size = host.shape[1], host.shape[2]
    head_pages, now = table.head_pages.view(-1), int(plan.clock)
    for at in misses[: int(plan.num_misses[layer])].tolist():
        head_page = ~int(head_pages[at])
        first = ((head_page * HASH & 0xFFFFFFFF) * hot_set.num_sets >> 32) * WAYS
        ages = hot_set.last_use[first : first + WAYS]
        if not len(ages) or int(ages.min()) >= now:
            counters[2] += 1
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
        counters[1] += 1


def read_pages(
    source: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    places: torch.Tensor,
    programs: int,
    exponents: torch.Tensor | None = None,
) -> None:
    wanted = places >= 0
    out[places[wanted].long()] = kept(source, exponents, blocks[wanted].long(), out.dtype)[:, :, : out.shape[2]]


def kept(host: torch.Tensor, exponents: torch.Tensor | None, index, dtype: torch.dtype) -> torch.Tensor:
    """``host[index]`` as the GPU sees it; ``index`` chooses blocks, and perhaps heads."""
    return host[index] if exponents is None else from_e4m3(host[index], exponents[index], dtype)


def to_e4m3(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kv`` [..., rows, 2 * head_dim] as codes and exponents [..., 2]; see :mod:`vllm_sparse.kernels.e4m3`."""
    most_coded = 61440 if kv.dtype is torch.float16 else 448 * 2.0**119
    parts = kv.float().unflatten(-1, (2, -1))
    finite, parts = parts.isfinite(), parts.clamp(-most_coded, most_coded)
    most = torch.where(finite, parts.abs(), 0).amax((-3, -1))
    mantissa, exponent = torch.frexp(most)
    exponents = torch.where(most > 0, exponent - 9 + (mantissa > 0.875) + 127, 1).clamp(min=1).to(torch.uint8)
    scaled = parts / _power_of(exponents)
    return torch.where(finite, scaled, float("nan")).flatten(-2).to(torch.float8_e4m3fn), exponents


def from_e4m3(codes: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float().unflatten(-1, (2, -1)) * _power_of(exponents)).flatten(-2).to(dtype)


def _power_of(exponents: torch.Tensor) -> torch.Tensor:
    return (exponents.int() << 23).view(torch.float32)[..., None, :, None]


def _staged(plan: WritePlan):
    """Yield (staged page, block, first row, end row)."""
    count = int(plan.num_pages)
    columns = (plan.blocks, plan.first_row, plan.end_row)
    yield from zip(range(count), *(column[:count].tolist() for column in columns), strict=True)

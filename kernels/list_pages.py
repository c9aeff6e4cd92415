"""list_pages: the pages that a chunk's last queries attend to, into the summary row of its last page.

    held[h, p] = sum of mass[g, k, p] over the group's query heads g and the bands k
    entry[h]   = last page, listed pages, pages to attend to, then pages by held, largest first

Pages of the window come before all others, the newest first; sinks are not listed, as they are always attended.
Where heads share out their budgets, the largest masses of all heads count, a head's first ``least_pages`` before
them, and each head attends to as many pages as it has among the ``kv_heads * budget_pages`` largest.
Where pages are too few for that, heads take as many alike of those to come.

See :mod:`vllm_sparse.freeze`. Sorting is torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.select_pages import _keep_largest

from vllm_sparse.query_blocks import QueryBlocks
from vllm_sparse.summaries import FROZEN_HEADER, list_capacity

ALWAYS = 1e6
"""Stands above any mass: a probe has at most 64 queries of each head."""
FIRST = 0x7F000000
"""Key of a page that a head has whatever its mass is; above the bits of any."""
BLOCK_PAGES = 512


@triton.jit(do_not_specialize=["num_pages", "width", "window_page", "sink_pages"])
def _held_masses(
    mass, held, num_pages, width, window_page, sink_pages,
    LINES: tl.constexpr, BLOCK: tl.constexpr, PROBED: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    pages = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if PROBED:
        for line in range(LINES):
            cells = mass + (head * LINES + line).to(tl.int64) * num_pages + pages
            total += tl.load(cells, mask=pages < num_pages, other=0.0)
    total = tl.where(pages >= window_page, ALWAYS + (pages - window_page).to(tl.float32), total)
    total = tl.where((pages < sink_pages) | (pages >= num_pages), -1.0, total)
    tl.store(held + head * width + pages, total, mask=pages < width)


@triton.jit(do_not_specialize=["last", "budget", "least", "most"])
def _write_lists(
    masses, order, lists, block_row, kv_stride_b, kv_stride_h, last, budget, least, most,
    KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, LISTED: tl.constexpr, LISTED_PAD: tl.constexpr,
    HEADER: tl.constexpr, SHARED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    head, place = tl.arange(0, HEADS_PAD), tl.arange(0, LISTED_PAD)[None, :]
    block = tl.load(block_row + last).to(tl.int64)
    inside = (head < KV_HEADS)[:, None] & (place < LISTED)
    cells = head[:, None] * LISTED + place
    held = tl.load(masses + cells, mask=inside, other=-1.0)
    page = tl.load(order + cells, mask=inside, other=0)
    entry = lists + block * kv_stride_b + head * kv_stride_h
    is_head = head < KV_HEADS
    tl.store(entry, tl.full([HEADS_PAD], 0, tl.int32).to(tl.int16) + last.to(tl.int16), mask=is_head)
    tl.store(entry + 1, tl.sum((held >= 0).to(tl.int32), axis=1).to(tl.int16), mask=is_head)
    budgets = tl.full([HEADS_PAD], 0, tl.int32) + budget
    if SHARED:
        keys = tl.where(held >= 0, held.to(tl.int32, bitcast=True) + LISTED_PAD + 1, LISTED_PAD - place)
        keys = tl.where(place < least, FIRST, keys)
        keys = tl.where(is_head[:, None] & (place < most), keys, 0).to(tl.uint32)
        keep = _keep_largest(tl.reshape(keys, [HEADS_PAD * LISTED_PAD]), budget * KV_HEADS)
        budgets = tl.sum(tl.reshape(keep.to(tl.int32), [HEADS_PAD, LISTED_PAD]), axis=1)
    tl.store(entry + 2, budgets.to(tl.int16), mask=is_head)
    tl.store(entry[:, None] + HEADER + place, page.to(tl.int16), mask=inside)


def list_pages(
    mass: torch.Tensor | None,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    sink_pages: int,
    window_tokens: int,
    budget_pages: int,
    least_pages: int,
    most_pages: int,
) -> None:
    """Write the lists of a chunk's last page; nothing waits for the device.

    Args:
        mass: float32 [q_heads, bands, num_pages], contiguous; None: pages of no known mass.
        kv: [num_blocks, kv_heads, page_size + 1, 2 * head_dim], its summaries ``frozen``.
        block_table: int32 [max_pages] of the request.
        chunk: queries of one request.
        page_size: tokens per page.
        sink_pages, window_tokens: what decoding always attends to.
        budget_pages: pages of a KV head beside the sinks; in the mean, where heads share.
        least_pages, most_pages: of any head; heads share out where ``most_pages`` is above ``budget_pages``.
    """
    kv_heads, num_pages = kv.shape[1], chunk.num_pages(page_size)
    assert kv.shape[2] > page_size and kv.stride(3) == 1, "the pages of this cache have no room for frozen"
    assert mass is None or (mass.is_contiguous() and mass.shape[2] == num_pages)
    listed = list_capacity(kv.shape[3] // 2, kv.element_size())
    width, words = max(num_pages, listed), kv.element_size() // 2
    held = torch.empty(kv_heads, width, dtype=torch.float32, device=kv.device)
    _held_masses[(kv_heads, triton.cdiv(width, BLOCK_PAGES))](
        mass, held, num_pages, width, max(0, chunk.end_position - max(1, window_tokens)) // page_size, sink_pages,
        LINES=0 if mass is None else mass.shape[0] * mass.shape[1] // kv_heads, BLOCK=BLOCK_PAGES,
        PROBED=mass is not None, ALWAYS=ALWAYS, num_warps=4,
    )  # fmt: skip
    masses, order = held.topk(listed, dim=1)
    _write_lists[(1,)](
        masses, order, kv.view(torch.int16)[:, :, page_size], block_table, kv.stride(0) * words,
        kv.stride(1) * words, num_pages - 1, budget_pages, least_pages, most_pages,
        KV_HEADS=kv_heads, HEADS_PAD=triton.next_power_of_2(kv_heads), LISTED=listed,
        LISTED_PAD=triton.next_power_of_2(max(listed, budget_pages)), HEADER=FROZEN_HEADER,
        SHARED=most_pages > budget_pages, FIRST=FIRST, num_warps=8,
    )  # fmt: skip

"""write_through: a step's new rows to the host, and the summaries of their pages to vLLM's blocks.

    host[blocks[s], h, r]   = hot[s, h, r]               for first_row[s] <= r < end_row[s]
    summaries[blocks[s], h] = hot[s, h, page_size:]
    slot of head page (blocks[s], h) = none

Where the host holds e4m3, all rows before ``end_row`` are written anew if the head page's exponents change.

A head page that a slot holds is a complete page; that its block is written again means that the block has a
new owner, or that the end of a context was taken back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import bytes_of, exponent_of, largest_coded, to_e4m3, warps_for
from vllm_sparse.pages.hot_set import HotSet
from vllm_sparse.pages.write_plan import WritePlan


@triton.jit
def _write_through(
    hot_ptr, host_ptr, exponents_ptr, summaries_ptr, blocks_ptr, first_row_ptr, end_row_ptr, num_pages_ptr,
    slot_of_ptr, slot_head_page_ptr, last_use_ptr, hot_stride_b, hot_stride_h, host_stride_b, host_stride_h,
    summary_stride_b, summary_stride_h,
    KV_HEADS: tl.constexpr, CONTENT: tl.constexpr, BLOCK_C: tl.constexpr, PAGE: tl.constexpr,
    SUMMARY: tl.constexpr, BLOCK_S: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    page, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page >= tl.load(num_pages_ptr):
        return
    block = tl.load(blocks_ptr + page).to(tl.int64)
    first, end = tl.load(first_row_ptr + page), tl.load(end_row_ptr + page)
    rows, column = tl.arange(0, PAGE)[:, None], tl.arange(0, BLOCK_C)[None, :]
    staged = hot_ptr + page * hot_stride_b + head * hot_stride_h
    cells = rows * CONTENT + column
    target = host_ptr + block * host_stride_b + head * host_stride_h + cells
    head_page = block * KV_HEADS + head
    mask = (rows < end) & (column < CONTENT)
    if exponents_ptr is None:
        mask &= rows >= first
        tl.store(target, tl.load(staged + cells, mask=mask), mask=mask)
    else:
        kv, in_key = tl.load(staged + cells, mask=mask, other=0.0).to(tl.float32), column < CONTENT // 2
        held = tl.minimum(tl.maximum(kv, -MOST), MOST)
        kv = tl.where(tl.abs(kv) < float("inf"), held, float("nan"))
        size = tl.where(kv == kv, tl.abs(kv), 0.0)
        of_key = exponent_of(tl.max(tl.where(in_key, size, 0.0)))
        of_value = exponent_of(tl.max(tl.where(in_key, 0.0, size)))
        kept = exponents_ptr + 2 * head_page
        fits = (tl.load(kept) == of_key) & (tl.load(kept + 1) == of_value)
        mask &= rows >= tl.where(fits, first, 0)
        tl.store(target, to_e4m3(kv, tl.where(in_key, of_key, of_value)), mask=mask)
        tl.debug_barrier()  # every warp has seen the exponents that were kept
        tl.store(kept, of_key.to(tl.uint8))
        tl.store(kept + 1, of_value.to(tl.uint8))
    cell = tl.arange(0, BLOCK_S)
    summary = tl.load(staged + PAGE * CONTENT + cell, mask=cell < SUMMARY)
    tl.store(
        summaries_ptr + block * summary_stride_b + head * summary_stride_h + cell, summary, mask=cell < SUMMARY
    )
    slot = tl.load(slot_of_ptr + head_page)
    if slot >= 0:
        tl.store(slot_head_page_ptr + slot, -1)
        tl.store(last_use_ptr + slot, 0)
        tl.store(slot_of_ptr + head_page, -1)


def write_through(
    hot: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    host: torch.Tensor,
    summaries: torch.Tensor,
    hot_set: HotSet,
    exponents: torch.Tensor | None = None,
) -> None:
    """Write what this step added to its staging pages to where it is kept.

    Args:
        hot: [pages, kv_heads, page_size + summary slots, 2 * head_dim]; the first are staging pages.
        plan: this step's pages.
        num_tokens: tokens of the step, which bound its pages.
        host: [num_blocks, kv_heads, page_size, 2 * head_dim], pinned.
        summaries: [num_blocks, kv_heads, summary slots, 2 * head_dim].
        hot_set: the layer's; head pages that are written are forgotten.
        exponents: uint8 [num_blocks, kv_heads, 2], where ``host`` is e4m3 (:mod:`vllm_sparse.kernels.e4m3`).
    """
    _, kv_heads, page_size, content = host.shape
    rows = summaries.shape[2]
    assert host.stride(2) == hot.stride(2) == summaries.stride(2) == content == hot.shape[3]
    assert host.stride(3) == hot.stride(3) == summaries.stride(3) == 1 and hot.shape[2] == page_size + rows
    most_pages = min(num_tokens, len(plan.blocks))
    _write_through[(most_pages, kv_heads)](
        bytes_of(hot), bytes_of(host), exponents, bytes_of(summaries), plan.blocks, plan.first_row, plan.end_row,
        plan.num_pages, hot_set.slot_of, hot_set.slot_head_page, hot_set.last_use,
        hot.stride(0), hot.stride(1), host.stride(0), host.stride(1), summaries.stride(0), summaries.stride(1),
        KV_HEADS=kv_heads, CONTENT=content, BLOCK_C=triton.next_power_of_2(content), PAGE=page_size,
        SUMMARY=rows * content, BLOCK_S=triton.next_power_of_2(rows * content), MOST=largest_coded(hot.dtype),
        num_warps=4 if exponents is None else warps_for(page_size * content),
    )  # fmt: skip

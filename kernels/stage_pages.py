"""stage_pages: what earlier steps wrote of the pages that this one goes on writing, from host to GPU.

    hot[s, h, r]          = host[blocks[s], h, r]        for r < first_row[s]
    hot[s, h, page_size:] = summaries[blocks[s], h]      if first_row[s] > 0

Pages that begin in this step, as most do in prefill, cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import bytes_of, from_e4m3, powers_256_of, warps_for
from vllm_sparse.pages.write_plan import WritePlan


@triton.jit
def _stage_pages(
    host_ptr, exponents_ptr, summaries_ptr, hot_ptr, blocks_ptr, first_row_ptr, num_pages_ptr, host_stride_b,
    host_stride_h, summary_stride_b, summary_stride_h, hot_stride_b, hot_stride_h,
    KV_HEADS: tl.constexpr, CONTENT: tl.constexpr, BLOCK_C: tl.constexpr, PAGE: tl.constexpr,
    SUMMARY: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    page, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page >= tl.load(num_pages_ptr):
        return
    first = tl.load(first_row_ptr + page)
    if first == 0:
        return
    block = tl.load(blocks_ptr + page).to(tl.int64)
    rows, column = tl.arange(0, PAGE)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < first) & (column < CONTENT)
    cells = rows * CONTENT + column
    kv = tl.load(host_ptr + block * host_stride_b + head * host_stride_h + cells, mask=mask)
    staged = hot_ptr + page * hot_stride_b + head * hot_stride_h
    if exponents_ptr is not None:
        kv = from_e4m3(kv, powers_256_of(exponents_ptr, block * KV_HEADS + head, column >= CONTENT // 2))
    tl.store(staged + cells, kv.to(hot_ptr.dtype.element_ty), mask=mask)
    cell = tl.arange(0, BLOCK_S)
    summary = tl.load(
        summaries_ptr + block * summary_stride_b + head * summary_stride_h + cell, mask=cell < SUMMARY
    )
    tl.store(staged + PAGE * CONTENT + cell, summary, mask=cell < SUMMARY)


def stage_pages(
    host: torch.Tensor,
    summaries: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    hot: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    """Copy the older rows of this step's pages, and the summaries of them, to their staging pages.

    Args:
        host: [num_blocks, kv_heads, page_size, 2 * head_dim], pinned.
        summaries: [num_blocks, kv_heads, summary slots, 2 * head_dim].
        plan: this step's pages.
        num_tokens: tokens of the step, which bound its pages.
        hot: [pages, kv_heads, page_size + summary slots, 2 * head_dim]; the first are staging pages.
        exponents: uint8 [num_blocks, kv_heads, 2], where ``host`` is e4m3 (:mod:`vllm_sparse.kernels.e4m3`).
    """
    _, kv_heads, page_size, content = host.shape
    rows = summaries.shape[2]
    assert host.stride(2) == hot.stride(2) == summaries.stride(2) == content
    assert host.stride(3) == hot.stride(3) == summaries.stride(3) == 1 and hot.shape[2] == page_size + rows
    most_pages = min(num_tokens, len(plan.blocks))
    _stage_pages[(most_pages, kv_heads)](
        bytes_of(host), exponents, bytes_of(summaries), bytes_of(hot), plan.blocks, plan.first_row, plan.num_pages,
        host.stride(0), host.stride(1), summaries.stride(0), summaries.stride(1), hot.stride(0), hot.stride(1),
        KV_HEADS=kv_heads, CONTENT=content, BLOCK_C=triton.next_power_of_2(content), PAGE=page_size,
        SUMMARY=rows * content, BLOCK_S=triton.next_power_of_2(rows * content),
        num_warps=4 if exponents is None else warps_for(page_size * content),
    )  # fmt: skip

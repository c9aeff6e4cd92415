"""page_write: K and V of new tokens into their pages, and the summaries of those pages.

    page[b, h, r] = [key | value]                  for each token with slot b * page_size + r
    page[b, h, page_size] = [min_r K | max_r K]    over rows 0..last written row (summary "minmax")

Summaries are recomputed from the page, never accumulated, so reused blocks, chunked prefill and
rejected drafts need no special case. Tokens that share a page are neighbours in the batch (they
are consecutive positions of one request): the program of the first one does the page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def _page_write(
    key, value, kv, slots,
    num_tokens, key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    kv_stride_b, kv_stride_h, kv_stride_r,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, MINMAX: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    block, first = slot // PAGE, slot % PAGE
    before = tl.load(slots + token - 1, mask=token > 0, other=-1)
    if (before >= 0) & (before // PAGE == block):
        return
    rows = tl.arange(0, PAGE)
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < HEAD_DIM)[None, :]
    # Row r of the page is token + r - first of the batch, if that token is of this page.
    source = token + rows - first
    in_batch = (rows >= first) & (source < num_tokens)
    source_slot = tl.load(slots + source, mask=in_batch, other=-1)
    fresh = in_batch & (source_slot == block * PAGE + rows)
    source = tl.where(fresh, source, token).to(tl.int64)[:, None]
    mask = fresh[:, None] & in_head
    k = tl.load(key + source * key_stride_t + head * key_stride_h + dims[None, :], mask=mask, other=0.0)
    v = tl.load(value + source * value_stride_t + head * value_stride_h + dims[None, :], mask=mask, other=0.0)
    page = kv + block.to(tl.int64) * kv_stride_b + head.to(tl.int64) * kv_stride_h
    cells = page + rows[:, None] * kv_stride_r + dims[None, :]
    tl.store(cells, k, mask=mask)
    tl.store(cells + HEAD_DIM, v, mask=mask)
    if MINMAX:
        old = (rows < first)[:, None]
        kept = tl.load(cells, mask=old & in_head, other=0.0)
        k = tl.where(old, kept, k).to(tl.float32)
        filled = old | fresh[:, None]
        low = tl.min(tl.where(filled, k, float("inf")), axis=0)
        high = tl.max(tl.where(filled, k, float("-inf")), axis=0)
        summary = page + PAGE * kv_stride_r + dims
        tl.store(summary, low.to(kv.dtype.element_ty), mask=dims < HEAD_DIM)
        tl.store(summary + HEAD_DIM, high.to(kv.dtype.element_ty), mask=dims < HEAD_DIM)


def page_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    summary: str,
) -> None:
    """Write new tokens and refresh the summaries of the pages they touch.

    Args:
        key, value: [num_tokens or more, kv_heads, head_dim], last dimension contiguous.
        kv: [num_blocks, kv_heads, page_size + summary rows, 2 * head_dim].
        slot_mapping: int64 [num_tokens], ``block * page_size + row``; -1 skips a token.
        page_size: tokens per page, a power of two.
        summary: ``none`` or ``minmax``.
    """
    num_tokens, (_, kv_heads, head_dim) = slot_mapping.shape[0], key.shape
    assert key.stride(2) == value.stride(2) == kv.stride(3) == 1, "head_dim must be contiguous"
    assert kv.shape[3] == 2 * head_dim and value.shape[1:] == key.shape[1:]
    assert page_size & (page_size - 1) == 0, f"page size {page_size} is not a power of two"
    if num_tokens == 0:
        return
    _page_write[(num_tokens, kv_heads)](
        key, value, kv, slot_mapping,
        num_tokens, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv.stride(0), kv.stride(1), kv.stride(2),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size,
        MINMAX=summary == "minmax", num_warps=1 if page_size <= 16 else 4,
    )  # fmt: skip

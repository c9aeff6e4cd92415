"""page_write: K and V of new tokens into their pages, and the summaries of those pages.

    page[b, h, r] = [key | value]             for each token with slot b * page_size + r, in a cache of e4m3 as
                                              codes of [key / k_scale | value / v_scale]
    page[b, h, page_size] = bytes of [c | w]                       (summary "key_range")

where over all rows, per channel, with int8 c and w, bfloat16 scales, and K as it is stored,

    c * c_scale = (max K + min K) / 2, to the nearest
    w * w_scale >= largest distance of a K from c * c_scale, rounded up

so ``c * c_scale +- w * w_scale`` holds every key of the page, in half the bytes of a 16-bit range.
Bit i of a scale is the lowest bit of channel i of what it scales, i < 16: those channels round to
even or odd numbers as it says. Scales beside the row cost a second memory access of every page,
which took scoring a fifth longer.

Sketches of keys (:mod:`vllm_sparse.kernels.sketch_write`) take the same place, one per tile of 16 rows.

Summaries are computed from the page, never accumulated, so reused blocks, chunked prefill and rejected drafts
need no special case. A page, or a tile, is summarised when its last row is written: until then a request attends
to it whatever it holds, and most decode steps do not complete one. Tokens that share a page are neighbours in the
batch (they are consecutive positions of one request): the program of the first one does the page, or the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import elements_of, saturated_e4m3, stored
from vllm_sparse.kernels.sketch_write import SMALLEST, write_sketch
from vllm_sparse.pages.summaries import SKETCH_BITS, TILE_TOKENS, SketchLayout, summary_slots

SCALE_BITS: tl.constexpr = tl.constexpr(16)
LEVELS: tl.constexpr = tl.constexpr(125.9)
"""Steps of a scale in the largest number: the next even or odd number after them still fits 7 bits."""
SKETCH_CHANNELS_PER_WARP = 64


@triton.jit
def _scale_bits(largest):
    """A bfloat16 above ``largest / LEVELS``, as an integer."""
    return (tl.maximum(largest / LEVELS, SMALLEST).to(tl.int32, bitcast=True) >> 16) + 1


@triton.jit
def _as_float(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _page_write(
    key_ptr, value_ptr, kv_ptr, kv_bytes_ptr, kv_words_ptr, slots_ptr, num_tokens, key_stride_t, key_stride_h,
    value_stride_t, value_stride_h, kv_stride_b, kv_stride_h, kv_stride_slot, k_scale, v_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    SKETCH_BITS: tl.constexpr, TILE_BYTES: tl.constexpr, ITEM_BYTES: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    slot = tl.load(slots_ptr + token)
    before = tl.load(slots_ptr + token - 1, mask=token > 0, other=-1)
    k = tl.load(key_ptr + token.to(tl.int64) * key_stride_t + head * key_stride_h + dims, mask=in_head)
    v = tl.load(value_ptr + token.to(tl.int64) * value_stride_t + head * value_stride_h + dims, mask=in_head)
    if slot < 0:
        return
    block, row = slot // PAGE, slot % PAGE
    page = block.to(tl.int64) * kv_stride_b + head.to(tl.int64) * kv_stride_h
    if ITEM_BYTES == 1:
        k = saturated_e4m3(k.to(tl.float32) / k_scale, kv_ptr.dtype.element_ty)
        v = saturated_e4m3(v.to(tl.float32) / v_scale, kv_ptr.dtype.element_ty)
    tl.store(kv_ptr + page + row * kv_stride_slot + dims, k, mask=in_head)
    tl.store(kv_ptr + page + row * kv_stride_slot + HEAD_DIM + dims, v, mask=in_head)
    # What follows a return is compiled all the same.
    if not OF_KEYS:
        return
    first = slot % TILE
    end = token + TILE - 1 - first
    is_first = (before < 0) | (before // TILE != slot // TILE)
    is_complete = tl.load(slots_ptr + end, mask=end < num_tokens, other=-1) == slot - first + TILE - 1
    if is_first & is_complete:
        rows = tl.arange(0, TILE)
        old = rows < first
        # Older rows come from the page, new ones from the batch: other programs write those just now.
        kept = kv_ptr + page + (row - first + rows)[:, None] * kv_stride_slot
        new = key_ptr + (token + rows - first).to(tl.int64)[:, None] * key_stride_t + head * key_stride_h
        mask = in_head[None, :]
        if ITEM_BYTES == 1:
            codes = tl.load(kept + dims[None, :], mask=mask & old[:, None], other=0.0)
            keys = tl.load(new + dims[None, :], mask=mask & ~old[:, None], other=0.0).to(tl.float32) / k_scale
            fresh_codes = saturated_e4m3(keys, kv_ptr.dtype.element_ty)
            keys = tl.where(old[:, None], stored(codes, tl.float32), stored(fresh_codes, tl.float32))
        else:
            cells = tl.where(old[:, None], kept, new)
            keys = tl.load(cells + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        summary = page + PAGE * kv_stride_slot
        if SKETCH_BITS:
            sketch = summary * ITEM_BYTES + row // TILE * TILE_BYTES
            write_sketch(kv_bytes_ptr + sketch, kv_words_ptr + sketch // 4, keys, SKETCH_BITS, BLOCK_D)
            return
        low, high = tl.min(keys, axis=0), tl.max(keys, axis=0)
        centre = low + (high - low) * 0.5
        carries = dims < SCALE_BITS
        place = tl.minimum(dims, SCALE_BITS - 1)
        c_bits = _scale_bits(tl.max(tl.abs(centre), axis=0))
        c_scale, bit = _as_float(c_bits), ((c_bits >> place) & 1).to(tl.float32)
        x = centre / c_scale
        c = tl.where(carries, 2 * tl.floor((x - bit) * 0.5 + 0.5) + bit, tl.floor(x + 0.5))
        half = tl.maximum(high - c * c_scale, c * c_scale - low)
        w_bits = _scale_bits(tl.max(half, axis=0))
        bit = ((w_bits >> place) & 1).to(tl.float32)
        x = half / _as_float(w_bits)
        w = tl.where(carries, 2 * tl.ceil((x - bit) * 0.5) + bit, tl.ceil(x))
        cells = kv_bytes_ptr + summary * ITEM_BYTES + dims
        tl.store(cells, c.to(tl.int8), mask=in_head)
        tl.store(cells + HEAD_DIM, w.to(tl.int8), mask=in_head)


def page_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    summary: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write new tokens, and the summaries of the pages that they complete.

    Args:
        key, value: [num_tokens or more, kv_heads, head_dim], last dimension contiguous.
        kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim].
        slot_mapping: int64 [num_tokens], ``block * page_size + row``; -1 skips a token.
        page_size: tokens per page, a power of two.
        summary: one of :data:`vllm_sparse.pages.summaries.SUMMARIES`.
        k_scale, v_scale: of a cache in e4m3; others have none.
    """
    num_tokens, (_, kv_heads, head_dim) = slot_mapping.shape[0], key.shape
    assert key.stride(2) == value.stride(2) == kv.stride(3) == 1, "head_dim must be contiguous"
    assert kv.shape[3] == 2 * head_dim and value.shape[1:] == key.shape[1:]
    assert head_dim >= SCALE_BITS.value, f"head_dim {head_dim} has no room for scales"
    assert page_size & (page_size - 1) == 0, f"page size {page_size} is not a power of two"
    if num_tokens == 0:
        return
    rows = summary_slots(summary, page_size, head_dim, kv.element_size())
    assert kv.shape[2] >= page_size + rows, f"the pages of this cache have no room for {summary}"
    assert rows < 2 or kv.stride(2) == kv.shape[3], "summary slots must follow each other"
    if kv.dtype is not torch.float8_e4m3fn:
        key, value = key.to(kv.dtype), value.to(kv.dtype)
    bits, width = 0, triton.next_power_of_2(head_dim)
    tile, tile_bytes, num_warps = page_size, 0, max(1, page_size // 32)
    if summary in SKETCH_BITS:
        layout = SketchLayout.of(summary, head_dim)
        bits, width, tile, tile_bytes = layout.bits, layout.width, TILE_TOKENS, layout.tile_bytes
        num_warps = max(1, width // SKETCH_CHANNELS_PER_WARP)
    _page_write[(num_tokens, kv_heads)](
        key, value, elements_of(kv), kv.view(torch.int8), kv.view(torch.int32), slot_mapping,
        num_tokens, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv.stride(0), kv.stride(1), kv.stride(2), k_scale, v_scale,
        HEAD_DIM=head_dim, BLOCK_D=width, PAGE=page_size, TILE=tile, SKETCH_BITS=bits, TILE_BYTES=tile_bytes,
        ITEM_BYTES=kv.element_size(),
        OF_KEYS=rows > 0,
        num_warps=num_warps,
    )  # fmt: skip

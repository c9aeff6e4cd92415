"""read_pages: pages of contexts into a buffer: ``out[places[p], h] = source[blocks[p], h, :page_size]``.

A few programs keep a link to the host busy and leave the other multiprocessors to what computes meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import bytes_of, from_e4m3, powers_256_of

TUNING = {"num_warps": 8, "block": 4096}


@triton.jit(do_not_specialize=["num_head_pages"])
def _read_pages(
    source_ptr, exponents_ptr, blocks_ptr, out_ptr, places_ptr, source_stride_b, source_stride_h, out_stride_b,
    out_stride_h, num_head_pages,
    KV_HEADS: tl.constexpr, HEAD_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    while item < num_head_pages:
        page, head = (item // KV_HEADS).to(tl.int64), (item % KV_HEADS).to(tl.int64)
        block, place = tl.load(blocks_ptr + page).to(tl.int64), tl.load(places_ptr + page).to(tl.int64)
        head_page = source_ptr + block * source_stride_b + head * source_stride_h
        target = out_ptr + place * out_stride_b + head * out_stride_h
        if place >= 0:
            for start in range(0, HEAD_PAGE, BLOCK):
                cells = start + tl.arange(0, BLOCK)
                kv = tl.load(head_page + cells, mask=cells < HEAD_PAGE)
                if exponents_ptr is not None:
                    powers = powers_256_of(exponents_ptr, block * KV_HEADS + head, (cells // HEAD_DIM) % 2 == 1)
                    kv = from_e4m3(kv, powers)
                tl.store(target + cells, kv.to(out_ptr.dtype.element_ty), mask=cells < HEAD_PAGE)
        item += tl.num_programs(0)


def read_pages(
    source: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    places: torch.Tensor,
    programs: int,
    exponents: torch.Tensor | None = None,
) -> None:
    """Copy K and V of whole pages.

    Args:
        source: [num_blocks, kv_heads, page_size or more rows, 2 * head_dim], on the GPU or pinned.
        blocks: int32 [num_pages], pages of ``source``.
        out: [pages, kv_heads, page_size, 2 * head_dim].
        places: int32 [num_pages], pages of ``out``, all different; -1 leaves a page out.
        programs: most programs that share the work.
        exponents: uint8 [num_blocks, kv_heads, 2], where ``source`` is e4m3 (:mod:`vllm_sparse.kernels.e4m3`).
    """
    kv_heads, page_size, content = out.shape[1:]
    num_head_pages = blocks.shape[0] * kv_heads
    assert blocks.shape == places.shape and blocks.stride(0) == places.stride(0) == 1
    assert source.shape[1] == kv_heads and (source.dtype is out.dtype) == (exponents is None)
    assert source.stride(2) == out.stride(2) == content and source.stride(3) == out.stride(3) == 1
    if num_head_pages == 0:
        return
    head_page = page_size * content
    _read_pages[(min(programs, num_head_pages),)](
        bytes_of(source), exponents, blocks, bytes_of(out), places,
        source.stride(0), source.stride(1), out.stride(0), out.stride(1), num_head_pages,
        KV_HEADS=kv_heads, HEAD_PAGE=head_page, HEAD_DIM=content // 2,
        BLOCK=min(TUNING["block"], triton.next_power_of_2(head_page)), num_warps=TUNING["num_warps"],
    )  # fmt: skip

"""vertical_slash: kept pages and kept bands of diagonals, as pages of each query block.

    keep[h, b, p] = page_keep[h, p]  or  any band d of head h is kept that touches (block b, page p)

A query of block b at positions s..e sees page p at distances s - (p + 1) page + 1 .. e - p page, so
the bands from floor((s + 1) / page) - 1 - p to floor(e / page) - p touch it: a range, which two
entries of a prefix sum answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS
from vllm_sparse.pages.query_blocks import QueryBlocks

BLOCK: tl.constexpr = tl.constexpr(1024)
"""Pages of a row that are worked on at a time."""


@triton.jit(do_not_specialize=["out_stride", "first_position", "end_position", "num_pages", "num_blocks"])
def _vertical_slash(
    page_keep_ptr, band_count_ptr, keep_ptr, keep_stride_h, count_stride_h, out_stride, first_position,
    end_position, num_pages, num_blocks,
    PAGE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.program_id(1)
    head, block = (row // num_blocks).to(tl.int64), row % num_blocks
    start = first_position + block * BLOCK_TOKENS
    last = tl.minimum(start + BLOCK_TOKENS, end_position) - 1
    page = tile * BLOCK + tl.arange(0, BLOCK)
    nearest = (start + 1) // PAGE - 1 - page
    farthest = last // PAGE - page
    live = (page < num_pages) & (farthest >= 0)
    counts = band_count_ptr + head * count_stride_h
    below = tl.load(counts + tl.maximum(nearest, 0), mask=live, other=0)
    through = tl.load(counts + farthest + 1, mask=live, other=0)
    vertical = tl.load(page_keep_ptr + head * keep_stride_h + page, mask=live, other=0)
    kept = live & ((through > below) | (vertical > 0))
    tl.store(keep_ptr + row.to(tl.int64) * out_stride + page, kept.to(tl.uint8), mask=page < num_pages)


def vertical_slash(
    page_keep: torch.Tensor,
    band_count: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    keep: torch.Tensor,
) -> None:
    """Write the keep mask of query blocks from a chunk's vertical pages and slash bands.

    Args:
        page_keep: uint8 [q_heads, pages of the chunk or more].
        band_count: int32 [q_heads, pages of the chunk + 1 or more]: kept bands before each band.
        blocks: query blocks of the chunk.
        page_size: tokens per page.
        keep: uint8 [q_heads * num_blocks, num_pages], overwritten.
    """
    rows, num_pages = keep.shape
    assert rows == page_keep.shape[0] * blocks.num_blocks and num_pages == blocks.num_pages(page_size)
    assert page_keep.stride(1) == band_count.stride(1) == keep.stride(1) == 1
    _vertical_slash[(rows, triton.cdiv(num_pages, BLOCK.value))](
        page_keep, band_count, keep, page_keep.stride(0), band_count.stride(0), keep.stride(0),
        blocks.first_position, blocks.end_position, num_pages, blocks.num_blocks,
        PAGE=page_size, num_warps=4,
    )  # fmt: skip

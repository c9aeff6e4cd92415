"""position_pattern: the keep mask of a PositionPattern, the same for any content.

    keep[h, b, p] = p * page < initial
                    or nearest < recent * dilation_h  and  (last - p) mod dilation_h = 0
                    or some multiple of stride lies in nearest..farthest
                    or hash(start_b, h, p) * (last + 1) < random / page

for the distances nearest..farthest at which block b sees page p, and its ``last`` page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS
from vllm_sparse.kernels.hash_uniform import hash_uniform
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.query_blocks import QueryBlocks

BLOCK: tl.constexpr = tl.constexpr(1024)
"""Pages of a row that are worked on at a time."""


@triton.jit(do_not_specialize=["keep_stride", "first_position", "end_position", "num_pages", "num_blocks"])
def _position_pattern(
    keep_ptr, keep_stride, first_position, end_position, num_pages, num_blocks,
    INITIAL: tl.constexpr, RECENT: tl.constexpr, DILATION: tl.constexpr, DILATED_HEADS: tl.constexpr,
    STRIDE: tl.constexpr, RANDOM_PAGES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.program_id(1)
    head, block = row // num_blocks, row % num_blocks
    start = first_position + block * BLOCK_TOKENS
    end = tl.minimum(start + BLOCK_TOKENS, end_position)
    last = (end - 1) // PAGE
    page = tile * BLOCK + tl.arange(0, BLOCK)
    nearest = tl.maximum(start - (page * PAGE + PAGE - 1), 0)
    farthest = end - 1 - page * PAGE
    dilation = tl.where(head % DILATED_HEADS == DILATED_HEADS - 1, DILATION, 1)
    chosen = page * PAGE < INITIAL
    chosen = chosen | ((nearest < RECENT * dilation) & (tl.maximum(last - page, 0) % dilation == 0))
    if STRIDE > 0:
        chosen = chosen | (tl.maximum(farthest, 0) // STRIDE * STRIDE >= nearest)
    if RANDOM_PAGES > 0:
        draw = hash_uniform(start, head, page)
        chosen = chosen | (draw * (last + 1) < RANDOM_PAGES)
    chosen = chosen & (farthest >= 0)
    tl.store(keep_ptr + row.to(tl.int64) * keep_stride + page, chosen.to(tl.uint8), mask=page < num_pages)


def position_pattern(pattern: PositionPattern, blocks: QueryBlocks, page_size: int, keep: torch.Tensor) -> None:
    """Write the keep mask of query blocks.

    Args:
        pattern: what to keep.
        blocks: the query blocks.
        page_size: tokens per page.
        keep: uint8 [q_heads * num_blocks, num_pages], overwritten.
    """
    rows, num_pages = keep.shape
    assert rows % blocks.num_blocks == 0 and num_pages == blocks.num_pages(page_size) and keep.stride(1) == 1
    _position_pattern[(rows, triton.cdiv(num_pages, BLOCK.value))](
        keep, keep.stride(0), blocks.first_position, blocks.end_position, num_pages, blocks.num_blocks,
        INITIAL=pattern.initial_tokens, RECENT=pattern.recent_tokens, DILATION=pattern.dilation,
        DILATED_HEADS=pattern.dilated_heads, STRIDE=pattern.stride_tokens,
        RANDOM_PAGES=-(-pattern.random_tokens // page_size),
        PAGE=page_size, num_warps=4,
    )  # fmt: skip

"""select_row_pages: the pages that hold most of the estimated mass of each (query head, block).

    mass[r, p] = exp(score[r, p] - max_p score[r, p]),    p before the page of the block's first query
    keep[r]    = the ``wanted`` largest, or (``top_p`` > 0) the fewest that hold that share of it

A block's own pages are attended anyway; with ``own_pages`` what they hold counts, as mass and as held. Of equal
masses at the threshold a number takes the first, a share all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS
from vllm_sparse.kernels.select_bands import _count_from, _kept, _threshold
from vllm_sparse.pages.query_blocks import QueryBlocks

BLOCK: tl.constexpr = tl.constexpr(1024)
"""Pages of a row that are worked on at a time."""


@triton.jit(
    do_not_specialize=[
        "score_stride", "keep_stride", "first_position", "end_position", "num_pages", "num_blocks", "wanted",
        "top_p",
    ]
)  # fmt: skip
def _select_row_pages(
    scores_ptr, keep_ptr, heads_ptr, score_stride, keep_stride, first_position, end_position, num_pages,
    num_blocks, wanted, top_p,
    PAGE: tl.constexpr, OWN_PAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    asked = 1 if heads_ptr is None else tl.load(heads_ptr + row // num_blocks)
    if asked == 0:
        return
    start = first_position + row % num_blocks * BLOCK_TOKENS
    count = start // PAGE
    score_row = scores_ptr + row.to(tl.int64) * score_stride
    lanes = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        values = tl.load(score_row + first + lanes, mask=first + lanes < count, other=float("-inf"))
        tops = tl.maximum(tops, values)
    top = tl.max(tops, axis=0)
    for first in range(0, count, BLOCK):
        live = first + lanes < count
        values = tl.load(score_row + first + lanes, mask=live, other=float("-inf"))
        tl.store(score_row + first + lanes, tl.exp(values - top), mask=live)
    beside = 0.0
    if OWN_PAGES:
        own = count + lanes
        live = own * PAGE < tl.minimum(start + BLOCK_TOKENS, end_position)
        peak = tl.where(top == float("-inf"), 0.0, top)  # of a block that begins a context
        beside = tl.sum(tl.exp(tl.load(score_row + own, mask=live, other=float("-inf")) - peak), axis=0)
    # Another thread reads what this one wrote.
    tl.debug_barrier()
    threshold, ties, tied = 0, count, 0
    if ((wanted > 0) & (wanted < count)) | (top_p > 0):
        threshold = _threshold(score_row, count, wanted, top_p, beside, BLOCK)
        if top_p == 0:
            ties = wanted - _count_from(score_row, count, threshold + 1, BLOCK)
    for first in range(0, num_pages, BLOCK):
        pages = first + lanes
        kept, tied = _kept(score_row, pages, count, threshold, ties, tied)
        kept = kept & ((wanted > 0) | (top_p > 0))
        tl.store(keep_ptr + row.to(tl.int64) * keep_stride + pages, kept.to(tl.uint8), mask=pages < num_pages)


def select_row_pages(
    scores: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    wanted_pages: int,
    top_p: float,
    keep: torch.Tensor,
    heads: torch.Tensor | None = None,
    own_pages: bool = False,
) -> None:
    """Choose pages of query blocks by their scores.

    Args:
        scores: float32 [q_heads * num_blocks, num_pages], in units of log-mass; overwritten by masses.
        blocks: the query blocks.
        page_size: tokens per page.
        wanted_pages: how many to keep, where ``top_p`` is 0.
        top_p: share of a row's mass that its pages must hold; all from 1 on.
        keep: uint8 [q_heads * num_blocks, num_pages], overwritten.
        heads: uint8 [q_heads], above 0: heads to choose for; other rows are neither read nor written. None: all.
        own_pages: whether scores of a block's own pages are masses of them, which count in ``top_p``.
    """
    rows, num_pages = scores.shape
    assert keep.shape == scores.shape and rows % blocks.num_blocks == 0
    assert num_pages == blocks.num_pages(page_size) and scores.stride(1) == keep.stride(1) == 1
    assert heads is None or (heads.shape == (rows // blocks.num_blocks,) and heads.stride(0) == 1)
    if top_p >= 1:
        wanted_pages, top_p = num_pages, 0.0
    _select_row_pages[(rows,)](
        scores, keep, heads, scores.stride(0), keep.stride(0), blocks.first_position, blocks.end_position,
        num_pages, blocks.num_blocks, wanted_pages, float(top_p),
        PAGE=page_size, OWN_PAGES=own_pages, num_warps=4,
    )  # fmt: skip

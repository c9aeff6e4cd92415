"""pooled_score: how the mean query of a block likes the mean key of a page.

    score[h, b, p] = scale * mean_{i in b} q[h, i] . mean_{j in p} K[j],    j up to the last query of all blocks

Mean pooling as in the block-sparse heads of Jiang et al., "MInference 1.0", arXiv 2407.02490. Means are
rounded to the dtype of queries, which is what tensor cores take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS, PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, stored
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import QueryBlocks

TUNING = {"rows": 32, "tile_bytes": 16384, "num_warps": 4}
"""``rows``: pages, and query blocks of the heads of a group, that a matrix product takes; fewer of wide heads."""


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _pool_queries(
    q_ptr, pooled_ptr, heads_ptr, q_stride_t, q_stride_h, pooled_stride, num_tokens, num_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head, block = row // num_blocks, row % num_blocks
    asked = 1 if heads_ptr is None else tl.load(heads_ptr + head)
    if asked == 0:
        return
    tokens = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_D)
    mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + head * q_stride_h + dims[None, :],
                    mask=mask, other=0.0).to(tl.float32)  # fmt: skip
    count = tl.minimum(num_tokens - block * BLOCK_TOKENS, BLOCK_TOKENS)
    mean = tl.sum(query, axis=0) / count
    tl.store(pooled_ptr + row * pooled_stride + dims, mean.to(pooled_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["score_stride", "end_position", "num_pages", "num_blocks"])
def _pooled_score(
    pooled_ptr, kv_ptr, block_table_ptr, scores_ptr, heads_ptr, pooled_stride, kv_stride_b, kv_stride_h,
    kv_stride_slot, score_stride, scale, end_position, num_pages, num_blocks,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if heads_ptr is not None:
        members = tl.arange(0, GROUP_PAD)
        wanted = tl.load(heads_ptr + head * GROUP + members, mask=members < GROUP, other=0)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    pages = tile * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    block = tl.load(block_table_ptr + pages, mask=pages < num_pages, other=0).to(tl.int64)
    cells = kv_ptr + block * kv_stride_b + head * kv_stride_h
    total = tl.zeros([BLOCK_D, ROWS], tl.float32)
    known = tl.minimum(end_position - pages * PAGE, PAGE)
    for row in range(PAGE):
        key = tl.load(cells[None, :] + row * kv_stride_slot + dims[:, None],
                      mask=(row < known)[None, :] & in_head[:, None], other=0.0)  # fmt: skip
        total += stored(key, tl.float32).to(tl.float32)
    mean = (total / tl.maximum(known, 1)[None, :]).to(pooled_ptr.dtype.element_ty)
    rows_per_head = GROUP * num_blocks
    for first in range(0, rows_per_head, ROWS):
        within = first + tl.arange(0, ROWS)
        rows = head * rows_per_head + within
        live = within < rows_per_head
        if heads_ptr is not None:
            live = live & (tl.load(heads_ptr + head * GROUP + within // num_blocks, mask=live, other=0) > 0)
        query = tl.load(pooled_ptr + rows[:, None] * pooled_stride + dims[None, :],
                        mask=live[:, None] & in_head[None, :], other=0.0)  # fmt: skip
        score = tl.dot(query, mean, input_precision=PRECISION) * scale
        tl.store(scores_ptr + rows[:, None] * score_stride + pages[None, :], score,
                 mask=live[:, None] & (pages < num_pages)[None, :])  # fmt: skip


def pooled_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    pooled: torch.Tensor,
    scores: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Score pages for query blocks, in units of log-mass.

    Args:
        q: [num_tokens, q_heads, head_dim], the queries of ``blocks``.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim].
        block_table: int32 [max_pages] of the request.
        blocks: the query blocks.
        geometry: of the layer.
        pooled: [q_heads * num_blocks or more, head_dim], the dtype of ``q``, overwritten: mean queries.
        scores: float32 [q_heads * num_blocks, num_pages], overwritten; of a block's own pages and later ones
            the scores look ahead.
        heads: uint8 [q_heads], above 0: heads to score; other rows are left as they are. None: all.
    """
    page_size, scale = geometry.page_size, geometry.scale
    num_tokens, q_heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    rows, num_pages = scores.shape
    assert rows == q_heads * blocks.num_blocks <= pooled.shape[0] and num_pages == blocks.num_pages(page_size)
    assert q.stride(2) == kv.stride(3) == pooled.stride(1) == scores.stride(1) == 1
    assert heads is None or (heads.shape == (q_heads,) and heads.stride(0) == 1)
    group = q_heads // kv_heads
    dims = dict(HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim))
    _pool_queries[(rows,)](
        q, pooled, heads, q.stride(0), q.stride(1), pooled.stride(0), num_tokens, blocks.num_blocks,
        **dims, num_warps=4,
    )  # fmt: skip
    token_bytes = dims["BLOCK_D"] * q.element_size()
    tile = max(16, min(TUNING["rows"], TUNING["tile_bytes"] // token_bytes))
    _pooled_score[(triton.cdiv(num_pages, tile), kv_heads)](
        pooled, elements_of(kv), block_table, scores, heads, pooled.stride(0), kv.stride(0), kv.stride(1),
        kv.stride(2), scores.stride(0), scale, blocks.end_position, num_pages, blocks.num_blocks,
        GROUP=group, **dims, PAGE=page_size, GROUP_PAD=triton.next_power_of_2(group), ROWS=tile,
        num_warps=TUNING["num_warps"], num_stages=3 if tile * token_bytes <= TUNING["tile_bytes"] else 2,
    )  # fmt: skip

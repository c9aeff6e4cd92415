"""antidiagonal_score: attention of a query block sampled along antidiagonals.

    L[r, j]        = scale / 16 * sum_{s < 16} q[h, 16 r + 15 - s] . K[16 j + s]
    score[h, b, p] = log sum_{r in b} sum_{j in p} softmax_j L[r, j]

Rows r are 16 queries of a block, columns j are 16 keys; j is seen where its first key is no later than
r's last query, and of its keys those up to the end of the chunk. A program holds the rows of several blocks: read
for one block alone, keys would take longer to read than to multiply.
Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428,
with stride 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, stored
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks

STRIDE: tl.constexpr = tl.constexpr(16)
LOG2_E = 1.4426950408889634
BLOCK_ROWS: tl.constexpr = tl.constexpr(BLOCK_TOKENS // STRIDE.value)
TUNING = {"token_bytes": 32768, "column_bytes": 16384, "num_warps": 8, "num_stages": 3}
"""``token_bytes``, ``column_bytes``: of queries and keys that a matrix product takes."""


@triton.jit
def _strided_logits(
    q_ptr, kv_head_ptr, block_table_ptr, columns, q_stride_t, q_row, num_tokens, first_position, end_position,
    kv_stride_b, kv_stride_slot, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """L [ROWS, BLOCK_J] in units of log2, -inf where nothing is seen; ``q_row`` [ROWS] first queries of rows."""
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    logits = tl.zeros([ROWS, BLOCK_J], tl.float32)
    for s in range(STRIDE):
        token = q_row + STRIDE - 1 - s
        query = tl.load(q_ptr + token.to(tl.int64)[:, None] * q_stride_t + dims[None, :],
                        mask=(token < num_tokens)[:, None] & in_head[None, :], other=0.0)  # fmt: skip
        key = columns * STRIDE + s
        known = key < end_position
        block = tl.load(block_table_ptr + key // PAGE, mask=known, other=0).to(tl.int64)
        cells = kv_head_ptr + block * kv_stride_b + (key % PAGE) * kv_stride_slot
        k = tl.load(cells[None, :] + dims[:, None], mask=known[None, :] & in_head[:, None], other=0.0)
        logits = tl.dot(query, stored(k, query.dtype), logits, input_precision=PRECISION)
    last = tl.minimum(q_row + STRIDE, num_tokens) - 1 + first_position
    seen = (q_row < num_tokens)[:, None] & (columns[None, :] * STRIDE <= last[:, None])
    return tl.where(seen, logits * scale_log2, float("-inf"))


@triton.jit(do_not_specialize=["score_stride", "first_position", "num_tokens", "num_blocks", "num_pages"])
def _antidiagonal_score(
    q_ptr, kv_ptr, block_table_ptr, scores_ptr, q_stride_t, q_stride_h, kv_stride_b, kv_stride_h,
    kv_stride_slot, score_stride, scale_log2, first_position, num_tokens, num_blocks, num_pages,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_J: tl.constexpr, PAGES_J: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCKS * BLOCK_ROWS
    head, first_block = tl.program_id(1), tl.program_id(0) * BLOCKS
    q_row = (first_block * BLOCK_ROWS + tl.arange(0, ROWS)) * STRIDE
    end_position = first_position + num_tokens
    seen_position = first_position + tl.minimum((first_block + BLOCKS) * BLOCK_ROWS * STRIDE, num_tokens)
    queries = q_ptr + head * q_stride_h
    base = kv_ptr + (head // GROUP).to(tl.int64) * kv_stride_h
    tiles = ((seen_position - 1) // STRIDE + BLOCK_J) // BLOCK_J
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(0, tiles):
        logits = _strided_logits(
            queries, base, block_table_ptr, tile * BLOCK_J + tl.arange(0, BLOCK_J), q_stride_t, q_row, num_tokens,
            first_position, end_position, kv_stride_b, kv_stride_slot, scale_log2,
            HEAD_DIM, BLOCK_D, PAGE, ROWS, BLOCK_J,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        peak = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - peak) + tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        top = new_top
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), 0.0)
    for tile in range(0, tiles):
        logits = _strided_logits(
            queries, base, block_table_ptr, tile * BLOCK_J + tl.arange(0, BLOCK_J), q_stride_t, q_row, num_tokens,
            first_position, end_position, kv_stride_b, kv_stride_slot, scale_log2,
            HEAD_DIM, BLOCK_D, PAGE, ROWS, BLOCK_J,
        )  # fmt: skip
        mass = tl.reshape(tl.exp2(logits - lse[:, None]), [BLOCKS, BLOCK_ROWS, BLOCK_J])
        mass = tl.sum(tl.reshape(tl.sum(mass, axis=1), [BLOCKS, PAGES_J, BLOCK_J // PAGES_J]), axis=2)
        block, page = first_block + tl.arange(0, BLOCKS), tile * PAGES_J + tl.arange(0, PAGES_J)
        row = (head * num_blocks + block).to(tl.int64)
        tl.store(scores_ptr + row[:, None] * score_stride + page[None, :], tl.log(tl.maximum(mass, 1e-30)),
                 mask=(block < num_blocks)[:, None] & (page < num_pages)[None, :])  # fmt: skip


def antidiagonal_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    scores: torch.Tensor,
) -> None:
    """Score pages for query blocks, in units of log-mass; arguments as in ``pooled_score``."""
    page_size, scale = geometry.page_size, geometry.scale
    num_tokens, q_heads, head_dim = q.shape
    rows, num_pages = scores.shape
    assert rows == q_heads * blocks.num_blocks and num_pages == blocks.num_pages(page_size)
    assert q.stride(2) == kv.stride(3) == scores.stride(1) == 1
    block_d = triton.next_power_of_2(head_dim)
    query_rows, columns = (
        TUNING[name] // (block_d * q.element_size()) for name in ("token_bytes", "column_bytes")
    )
    block_j = max(min(columns, 64), page_size // STRIDE.value)
    num_blocks = min(max(2, query_rows // BLOCK_ROWS.value), 16, triton.next_power_of_2(max(2, blocks.num_blocks)))
    _antidiagonal_score[(triton.cdiv(blocks.num_blocks, num_blocks), q_heads)](
        q, elements_of(kv), block_table, scores, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1),
        kv.stride(2), scores.stride(0), scale * LOG2_E / STRIDE.value, blocks.first_position, num_tokens,
        blocks.num_blocks, num_pages,
        GROUP=q_heads // kv.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE=page_size,
        BLOCKS=num_blocks, BLOCK_J=block_j, PAGES_J=block_j * STRIDE.value // page_size,
        num_warps=TUNING["num_warps"], num_stages=TUNING["num_stages"],
    )  # fmt: skip

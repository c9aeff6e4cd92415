"""sparse_prefill: attention of query blocks over the pages of a PageTable.

    out[t, h] = softmax(scale * q[t, h] . K[chosen]) V[chosen]    over all but the last n - 1 - i tokens
                                                                  of the row, for query i of n in its block

FlashAttention-2 (Dao, arXiv 2307.08691) with one table row per (query head, block): only the last
tokens of a row need a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS, PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, scaled_queries, stored
from vllm_sparse.kernels.logits import capped, with_sinks
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable

LOG2_E = 1.4426950408889634
TUNING = {"tile_bytes": 16384, "query_bytes": 32768, "num_warps": 8, "num_stages": 2}


@triton.jit
def _attend_tokens(
    query, kv_ptr, table_row_ptr, seen, begin, end, top, total, acc, head_page_stride, kv_stride_slot,
    scale_log2, cap_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Add tokens begin..end of a table row to a running softmax; ``seen`` [queries]: tokens each sees."""
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        live = tokens < end
        head_page = tl.load(table_row_ptr + tokens // PAGE, mask=live, other=0).to(tl.int64)
        cells = kv_ptr + head_page * head_page_stride + (tokens % PAGE) * kv_stride_slot
        k = tl.load(cells[None, :] + dims[:, None], mask=live[None, :] & in_head[:, None], other=0.0)
        logits = tl.dot(query, stored(k, query.dtype), input_precision=PRECISION) * scale_log2
        if CAPPED:
            logits = capped(logits, cap_log2)
        if MASKED:
            logits = tl.where(tokens[None, :] < seen[:, None], logits, float("-inf"))
        v = tl.load(cells[:, None] + HEAD_DIM + dims[None, :], mask=live[:, None] & in_head[None, :], other=0.0)
        v = stored(v, query.dtype)
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize=["table_stride_row", "num_tokens", "num_blocks"])
def _sparse_prefill(
    q_ptr, sinks_ptr, kv_ptr, head_pages_ptr, lengths_ptr, out_ptr, q_stride_t, q_stride_h, head_page_stride,
    kv_stride_slot, table_stride_row, out_stride_t, out_stride_h, scale_log2, cap_log2, v_scale, num_tokens,
    num_blocks,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, CODES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # The longest rows, those of the last blocks, first.
    row, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    head, block = row // num_blocks, row % num_blocks
    length = tl.load(lengths_ptr + row)
    in_block = part * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = tl.minimum(num_tokens - block * BLOCK_TOKENS, BLOCK_TOKENS)
    if (part * BLOCK_M >= queries) | (length == 0):
        return
    token = (block * BLOCK_TOKENS + in_block).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = (in_block < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q_ptr + token[:, None] * q_stride_t + head * q_stride_h + dims[None, :], mask=mask, other=0.0)
    if CODES and query.dtype == tl.bfloat16:
        query, power = scaled_queries(query)
        scale_log2 *= power[:, None]
    seen = tl.minimum(length - (queries - 1 - in_block), length)
    # Every query sees a row's tokens up to the block's first one: full tiles of those need no mask.
    common = (length - (queries - 1 - part * BLOCK_M)) // BLOCK_N * BLOCK_N
    last = tl.minimum(length - (queries - (part + 1) * BLOCK_M), length)
    table_row = head_pages_ptr + row.to(tl.int64) * table_stride_row
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top, total, acc = _attend_tokens(
        query, kv_ptr, table_row, seen, 0, common, top, total, acc, head_page_stride, kv_stride_slot, scale_log2,
        cap_log2, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, False, CAPPED,
    )  # fmt: skip
    top, total, acc = _attend_tokens(
        query, kv_ptr, table_row, seen, common, last, top, total, acc, head_page_stride, kv_stride_slot,
        scale_log2, cap_log2, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, True, CAPPED,
    )  # fmt: skip
    if sinks_ptr is not None:
        top, total, fade = with_sinks(top, total, tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634)
        acc *= fade[:, None]
    if CODES:
        acc *= v_scale
    target = out_ptr + token[:, None] * out_stride_t + head * out_stride_h + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    table: PageTable,
    geometry: Geometry,
    out: torch.Tensor,
) -> None:
    """Attend over chosen pages; arguments as in
    :meth:`vllm_sparse.attention.base.AttentionKernel.attend_blocks`."""
    page_size, scale = geometry.page_size, geometry.scale
    num_tokens, q_heads, head_dim = q.shape
    num_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS.value)
    rows = q_heads * num_blocks
    assert table.lengths.shape[0] == rows, f"{table.lengths.shape[0]} rows for {rows} (query head, block)"
    assert q.stride(2) == out.stride(2) == kv.stride(3) == table.head_pages.stride(1) == 1
    block_d = triton.next_power_of_2(head_dim)
    token_bytes = block_d * q.element_size()
    block_m = max(16, min(BLOCK_TOKENS.value, TUNING["query_bytes"] // token_bytes))
    block_n = max(16, min(128, TUNING["tile_bytes"] // token_bytes))
    _sparse_prefill[(rows, BLOCK_TOKENS.value // block_m)](
        q, geometry.sink_logits, elements_of(kv), table.head_pages, table.lengths, out, q.stride(0), q.stride(1),
        HeadPageGrid.of(kv).stride, kv.stride(2),
        table.head_pages.stride(0), out.stride(0), out.stride(1), scale * LOG2_E,
        geometry.soft_cap * LOG2_E, geometry.v_scale, num_tokens, num_blocks,
        BLOCK_M=block_m, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE=page_size,
        BLOCK_N=block_n, CODES=kv.dtype is torch.float8_e4m3fn, CAPPED=geometry.soft_cap > 0,
        num_warps=TUNING["num_warps"], num_stages=TUNING["num_stages"],
    )  # fmt: skip

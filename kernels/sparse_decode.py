"""sparse_decode: attention of decode rows over the pages of a PageTable.

    out[t, h] = softmax(scale * q[t, h] . K[chosen]) V[chosen]

A request has one query token, or with drafts a few, which are rows of one matrix product with those of its group:
each page is read once for all of them. Its chosen tokens end with these tokens themselves, so that token i of n
sees all but the last ``n - 1 - i`` of them.

A chosen head page below 0 is head page ``~head_page`` of a second cache, in pinned host memory,
read in place; it may hold e4m3.
Rows that the table does not list, those of prompt tokens, are read through the block table: all of their pages.

Flash-decoding: programs share the pages of a row, each keeps a running softmax, and a second
kernel adds their parts. Dao et al., FlashAttention-2 (arXiv 2307.08691); split-K: "Flash-Decoding
for long-context inference", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import PRECISION, WHOLE
from vllm_sparse.kernels.e4m3 import bytes_of, elements_of, from_e4m3, power_256_of, scaled_queries, stored
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.kernels.logits import capped, with_sinks
from vllm_sparse.kernels.query_tokens import span_of
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable

LOG2_E = 1.4426950408889634
TILE_BYTES = 32768
MAX_SPLITS = 64
MOST_ROWS = 64
"""Query rows of a program; where a KV head has more, several programs read its pages."""
WARP_CHANNELS = 128
"""Channels of an output for each warp: with 256 of a head of 512 its threads keep them outside of registers."""
TUNING = {"block_tokens": 64, "waves": 4, "num_warps": 2, "num_stages": 3, "add_warps": 1}
"""Chosen on one H200 for batches of 1 to 8; 32 requests of 8,192 tokens took 3 % longer than with tiles of 128."""


@triton.jit
def _absorb(top, total, acc, logits, v, CAUSAL: tl.constexpr):
    """A running softmax with one more tile: its largest logit, sum of weights, and weighted sum of values."""
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    base = new_top
    if CAUSAL:  # a token may see nothing of a tile
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["splits"])
def _attend_split(
    q_ptr, starts_ptr, sinks_ptr, kv_ptr, host_ptr, exponents_ptr, head_pages_ptr, lengths_ptr, routes_ptr,
    block_table_ptr, out_ptr, part_out_ptr, part_lse_ptr, q_stride_token, q_stride_h, head_page_stride,
    kv_stride_slot, host_head_page_stride, host_stride_slot, table_stride_row, table_stride, per_block, per_head,
    out_stride_token, out_stride_h, scale_log2, cap_log2, v_scale, splits,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, ALONE: tl.constexpr,
    ON_HOST: tl.constexpr, CODES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    request, head = row // KV_HEADS, row % KV_HEADS
    length = tl.load(lengths_ptr + row)
    if length == 0:
        return
    GROUP: tl.constexpr = HEADS * TOKENS
    CAUSAL: tl.constexpr = TOKENS > 1
    group = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    first, count = span_of(starts_ptr, request)
    member, seen = group < GROUP, length
    if CAUSAL:
        member = group < count * HEADS
        seen = tl.maximum(length - tl.maximum(count - 1 - group // HEADS, 0), 1)
    q_mask = member[:, None] & in_head[None, :]
    tokens, heads = first.to(tl.int64) + group // HEADS, head * HEADS + group % HEADS
    query = tl.load(q_ptr + (tokens * q_stride_token + heads * q_stride_h)[:, None] + dims[None, :],
                    mask=q_mask, other=0.0)  # fmt: skip
    if CODES and query.dtype == tl.bfloat16:
        query, power = scaled_queries(query)
        scale_log2 *= power[:, None]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    blocks_all = (length + BLOCK_N - 1) // BLOCK_N
    per_split = (blocks_all + splits - 1) // splits
    begin = split * per_split * BLOCK_N
    end = tl.minimum(begin + per_split * BLOCK_N, length)
    table_row = head_pages_ptr + row.to(tl.int64) * table_stride_row
    whole = False
    if routes_ptr is not None:
        whole = tl.load(routes_ptr + request) == WHOLE
        table_row = tl.where(whole, block_table_ptr + request.to(tl.int64) * table_stride, table_row)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        live = at < length
        head_page = tl.load(table_row + at // PAGE, mask=live, other=0).to(tl.int64)
        if routes_ptr is not None:
            of_block = head_page * per_block + head * per_head
            head_page = tl.where(whole, ~of_block if ON_HOST else of_block, head_page)
        cells = kv_ptr + head_page * head_page_stride + (at % PAGE) * kv_stride_slot
        here = live
        if ON_HOST:
            away = host_ptr + ~head_page * host_head_page_stride + (at % PAGE) * host_stride_slot
            if exponents_ptr is None:
                cells = tl.where(head_page < 0, away, cells)
            else:
                coded, here = live & (head_page < 0), live & (head_page >= 0)
                some_coded = tl.max(coded.to(tl.int32), axis=0) > 0
        k = tl.load(cells[None, :] + dims[:, None], mask=here[None, :] & in_head[:, None], other=0.0)
        if exponents_ptr is not None:  # noqa: SIM102  settled when the kernel is compiled
            if some_coded:
                code = tl.load(away[None, :] + dims[:, None], mask=coded[None, :] & in_head[:, None], other=0)
                power = power_256_of(tl.load(exponents_ptr + 2 * ~head_page, mask=coded, other=0))[None, :]
                k = tl.where(coded[None, :], from_e4m3(code, power).to(k.dtype), k)
        logits = tl.dot(query, stored(k, query.dtype), input_precision=PRECISION) * scale_log2
        if CAPPED:
            logits = capped(logits, cap_log2)
        visible = at[None, :] < seen[:, None] if CAUSAL else live[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        v = tl.load(cells[:, None] + HEAD_DIM + dims[None, :], mask=here[:, None] & in_head[None, :], other=0.0)
        if exponents_ptr is not None:  # noqa: SIM102  settled when the kernel is compiled
            if some_coded:
                code = tl.load(away[:, None] + HEAD_DIM + dims[None, :], mask=coded[:, None] & in_head[None, :],
                               other=0)  # fmt: skip
                power = power_256_of(tl.load(exponents_ptr + 2 * ~head_page + 1, mask=coded, other=0))[:, None]
                v = tl.where(coded[:, None], from_e4m3(code, power).to(v.dtype), v)
        top, total, acc = _absorb(top, total, acc, logits, stored(v, query.dtype), CAUSAL)
    if CODES:
        acc *= v_scale
    if ALONE:
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + heads, mask=member, other=0.0).to(tl.float32) * 1.4426950408889634
            top, total, fade = with_sinks(top, total, sinks)
            acc *= fade[:, None]
        target = out_ptr + (tokens * out_stride_token + heads * out_stride_h)[:, None] + dims[None, :]
        tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        part = (row.to(tl.int64) * splits + split) * GROUP + group
        filled = begin < end
        tl.store(part_lse_ptr + part, tl.where(filled, top + tl.log2(total), float("-inf")), mask=member)
        if filled:
            target = part_out_ptr + part[:, None] * BLOCK_D + dims[None, :]
            tl.store(target, acc / total[:, None], mask=member[:, None])


@triton.jit(do_not_specialize=["splits"])
def _add_splits(
    lengths_ptr, starts_ptr, sinks_ptr, part_out_ptr, part_lse_ptr, out_ptr, out_stride_token,
    out_stride_h, splits,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS * TOKENS
    row, g = tl.program_id(0), tl.program_id(1)
    if tl.load(lengths_ptr + row) == 0:
        return
    first, count = span_of(starts_ptr, row // KV_HEADS)
    if TOKENS > 1 and g >= count * HEADS:
        return
    token, head = first.to(tl.int64) + g // HEADS, (row % KV_HEADS) * HEADS + g % HEADS
    split = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * splits + split) * GROUP + g
    lse = tl.load(part_lse_ptr + part, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, axis=0)
    if sinks_ptr is not None:
        top, total, fade = with_sinks(top, total, tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634)
        weights *= fade
    # Parts of splits without tokens were never written, and a token that sees none of a split's wrote no number.
    filled = (weights > 0)[:, None]
    parts = tl.load(part_out_ptr + part[:, None] * BLOCK_D + dims[None, :], mask=filled, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / total
    target = out_ptr + token * out_stride_token + head * out_stride_h + dims
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def num_splits(rows: int, blocks: int, device: torch.device) -> int:
    """Programs per row: those that run at once, each with the same number of blocks if it can be."""
    running = TUNING["waves"] * num_multiprocessors(device)
    splits = max(1, min(blocks, running // rows, MAX_SPLITS))
    return triton.cdiv(blocks, triton.cdiv(blocks, splits))


def sparse_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    table: PageTable,
    geometry: Geometry,
    out: torch.Tensor,
    host: torch.Tensor | None = None,
    exponents: torch.Tensor | None = None,
) -> None:
    """Attend over chosen pages; arguments as in :meth:`vllm_sparse.attention.base.AttentionKernel.attend`.

    Reads ``4 * head_dim`` bytes (16-bit cache) per chosen token and KV head.
    """
    page_size, scale, queries = geometry.page_size, geometry.scale, table.queries
    (q_heads, head_dim), kv_heads, rows = q.shape[1:], kv.shape[1], len(table.lengths)
    heads = q_heads // kv_heads
    group = heads * queries.most
    assert rows == kv_heads * (len(q) if queries.starts is None else len(queries.starts) - 1)
    assert q.stride(2) == out.stride(2) == kv.stride(3) == 1
    block_d = triton.next_power_of_2(head_dim)
    # K and V tiles of 32 KiB: two stages of both fit the shared memory of every GPU since 2020.
    block_n = min(TUNING["block_tokens"], TILE_BYTES // (block_d * q.element_size()))
    tile_rows = min(MOST_ROWS, max(16, triton.next_power_of_2(group)))
    splits = num_splits(rows, triton.cdiv(table.head_pages.shape[1] * page_size, block_n), q.device)
    part_out = part_lse = out
    if splits > 1:
        part_out = torch.empty((rows, splits, group, block_d), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((rows, splits, group), dtype=torch.float32, device=q.device)
    assert host is None or (host.dtype is kv.dtype) == (exponents is None)
    cache = elements_of(kv)
    second = cache if host is None else elements_of(host) if exponents is None else bytes_of(host)
    grid = HeadPageGrid.of(second)
    block_table = table.head_pages if table.block_table is None else table.block_table
    assert second.stride(3) == 1
    _attend_split[(rows, splits, triton.cdiv(group, tile_rows))](
        q, queries.starts, geometry.sink_logits, cache, second, exponents, table.head_pages, table.lengths,
        table.routes, block_table, out, part_out, part_lse,
        q.stride(0), q.stride(1), HeadPageGrid.of(kv).stride, kv.stride(2), grid.stride, second.stride(2),
        table.head_pages.stride(0), block_table.stride(0), grid.per_block, grid.per_head,
        out.stride(0), out.stride(1), scale * LOG2_E, geometry.soft_cap * LOG2_E,
        geometry.v_scale, splits,
        KV_HEADS=kv_heads, HEADS=heads, TOKENS=queries.most, ROWS=tile_rows, HEAD_DIM=head_dim,
        BLOCK_D=block_d, PAGE=page_size, BLOCK_N=block_n, ALONE=splits == 1,
        ON_HOST=host is not None, CODES=kv.dtype is torch.float8_e4m3fn,
        CAPPED=geometry.soft_cap > 0,
        num_warps=max(TUNING["num_warps"], tile_rows // 16, block_d // WARP_CHANNELS),
        num_stages=2 if exponents is not None else TUNING["num_stages"],
    )  # fmt: skip
    if splits > 1:
        _add_splits[(rows, group)](
            table.lengths, queries.starts, geometry.sink_logits, part_out, part_lse, out, out.stride(0),
            out.stride(1), splits,
            KV_HEADS=kv_heads, HEADS=heads, TOKENS=queries.most, HEAD_DIM=head_dim, BLOCK_D=block_d,
            SPLITS_PAD=triton.next_power_of_2(splits),
            num_warps=TUNING["add_warps"],
        )  # fmt: skip

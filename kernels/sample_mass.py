"""sample_mass: where a sample of queries puts its attention, by the largest logit of each 16 keys.

    top[h, t, s]   = cap(scale * max_{j in s} q[h, t] . K[j]),    j <= t
    score[h, b, p] = log sum_{t in b or its neighbour} sum_{s in p} softmax_s(top[h, t, s])

over stretches s of 16 keys, a sink logit among them where the model has one, and the last of every 8 queries t of
two blocks, which share what they say. An eighth of the queries costs a sixteenth of attention's products; what a
softmax over keys costs beside its products, exponentials above all, would double that. The largest logit of a
stretch stands for its sum: it was measured to find pages better (docs/prefill.md).

Two kernels. The first one multiplies, keeps each stretch's largest logit in 16 bits, and a sum of powers for each
asked query and program, of which several may share a context. Query heads that share keys, or blocks that follow
each other, fill its rows together. The second divides by the sums and adds up queries, once over what is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import (
    BLOCK_TOKENS,
    MOST_SPLITS,
    PRECISION,
    SAMPLE_BLOCKS,
    SAMPLE_EVERY,
    SAMPLE_ROWS,
    STRETCH,
    STRETCHES,
)
from vllm_sparse.kernels.e4m3 import coded_queries, elements_of, scaled_queries, stored
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.kernels.logits import capped
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.pages.sample import most_splits, sample_logits, sample_room

LOG2_E = 1.4426950408889634
LARGEST: tl.constexpr = tl.constexpr(60000.0)
"""Logits end here, inside float16."""
TUNING = {"rows": 128, "query_bytes": 65536, "tile_bytes": 32768, "num_warps": 4, "num_stages": 3, "waves": 4}
"""``rows``: asked queries of a program; ``waves``: programs for each multiprocessor, if tiles are enough."""
FOLD_TUNING = {"BLOCK": 512, "num_warps": 4}
"""Of the second kernel, whose programs take ``BLOCK`` stretches each."""


@triton.jit
def _store_tops(
    begin, end, query, scales, positions, live, top, total, kv_head_ptr, block_table_ptr, row_tops_ptr,
    end_position, kv_stride_b, kv_stride_slot, cap_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Store the tops of tiles begin..end, to base 2; ``row_tops_ptr`` [rows]: where those of tile 0 lie.

    ``top`` and ``total`` [rows, groups of a tile, STRETCHES], the largest of each column of tops so far and the
    sum of their powers of two beside it, are returned with these tiles.
    """
    GROUPS: tl.constexpr = BLOCK_N // (STRETCH * STRETCHES)
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    group, member = tl.arange(0, GROUPS), tl.arange(0, STRETCHES)
    # A thread of a matrix product holds columns 2i, 2i + 1, 8 + 2i, 8 + 2i + 1, ... of a row: the keys of a
    # stretch go there, so that to find the largest of them threads need not ask each other.
    place = lane % (STRETCH * STRETCHES)
    key = (lane // (STRETCH * STRETCHES) * STRETCHES + place // 2 % 4) * STRETCH + place // 8 * 2 + place % 2
    for tile in range(begin, end):
        tokens = tile * BLOCK_N + key
        known = tokens < end_position
        block = tl.load(block_table_ptr + tokens // PAGE, mask=known, other=0).to(tl.int64)
        keys = kv_head_ptr + block * kv_stride_b + (tokens % PAGE) * kv_stride_slot
        k = tl.load(keys[None, :] + dims[:, None], mask=known[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        logits = tl.dot(query, stored(k, query.dtype), input_precision=PRECISION)
        if MASKED:
            logits = tl.where(tokens[None, :] <= positions[:, None], logits, float("-inf"))
        tops = tl.max(tl.reshape(logits, [query.shape[0], GROUPS, STRETCH // 2, 4, 2]), axis=4)
        tops = tl.max(tops, axis=2) * scales[:, None, None]
        seen = tops > float("-inf")
        if CAPPED:
            tops = capped(tops, cap_log2)
        tops = tl.minimum(tl.maximum(tops, -LARGEST), LARGEST)
        if MASKED:
            tops = tl.where(seen, tops, float("-inf"))
        cells = (tile * GROUPS + group) * (SAMPLE_ROWS * STRETCHES)
        target = row_tops_ptr[:, None, None] + cells[None, :, None] + member[None, None, :]
        tl.store(target, tops.to(tl.float16), mask=live[:, None, None])
        new_top = tl.maximum(top, tops)
        base = new_top
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.exp2(tops - base)
        top = new_top
    return top, total


@triton.jit(
    do_not_specialize=["first_position", "num_tokens", "first_head", "first_block", "num_blocks", "splits"]
)
def _sample_tops(
    q_ptr, kv_ptr, block_table_ptr, tops_ptr, sums_ptr, q_stride_t, q_stride_h, kv_stride_b, kv_stride_h,
    kv_stride_slot, tops_stride, scale_log2, cap_log2, first_position, num_tokens, first_head, first_block,
    num_blocks, splits,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    # The longest rows, those of the last blocks, first.
    bundle, blocks, split = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    line = tl.arange(0, HEADS * BLOCKS * SAMPLE_ROWS)
    of_head, of_block = line // (BLOCKS * SAMPLE_ROWS), blocks * BLOCKS + line // SAMPLE_ROWS % BLOCKS
    in_chunk = (first_block + of_block) * BLOCK_TOKENS + line % SAMPLE_ROWS * SAMPLE_EVERY + SAMPLE_EVERY
    in_chunk = tl.minimum(in_chunk, num_tokens) - 1
    positions = first_position + in_chunk
    head, dims = first_head + bundle * HEADS, tl.arange(0, BLOCK_D)
    rows = q_ptr + in_chunk.to(tl.int64) * q_stride_t + (head + of_head) * q_stride_h
    query = tl.load(rows[:, None] + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)
    scales = tl.full([HEADS * BLOCKS * SAMPLE_ROWS], 1.0, tl.float32) * scale_log2
    if kv_ptr.dtype.element_ty == tl.float8e4nv:
        query, power = coded_queries(query)
        scales *= power
    elif CODES and query.dtype == tl.bfloat16:
        query, power = scaled_queries(query)
        scales *= power
    start = first_position + (first_block + blocks * BLOCKS) * BLOCK_TOKENS
    end_position = tl.minimum(start + BLOCKS * BLOCK_TOKENS, first_position + num_tokens)
    tiles = (end_position + BLOCK_N - 1) // BLOCK_N
    per_split = (tiles + splits - 1) // splits
    begin, end = tl.minimum(split * per_split, tiles), tl.minimum((split + 1) * per_split, tiles)
    # Tiles up to here hold no key that a query of the program does not see.
    common = tl.minimum(tl.maximum(start // BLOCK_N, begin), end)
    keys = kv_ptr + (head // GROUP).to(tl.int64) * kv_stride_h
    pair = (bundle * HEADS + of_head) * num_blocks + of_block
    row_tops = tops_ptr + pair.to(tl.int64) * tops_stride + line % SAMPLE_ROWS * STRETCHES
    live = of_block < num_blocks
    shape: tl.constexpr = (HEADS * BLOCKS * SAMPLE_ROWS, BLOCK_N // (STRETCH * STRETCHES), STRETCHES)
    top, total = tl.full(shape, float("-inf"), tl.float32), tl.zeros(shape, tl.float32)
    top, total = _store_tops(
        begin, common, query, scales, positions, live, top, total, keys, block_table_ptr, row_tops, end_position,
        kv_stride_b, kv_stride_slot, cap_log2, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, False, CAPPED,
    )  # fmt: skip
    top, total = _store_tops(
        common, end, query, scales, positions, live, top, total, keys, block_table_ptr, row_tops, end_position,
        kv_stride_b, kv_stride_slot, cap_log2, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, True, CAPPED,
    )  # fmt: skip
    most = tl.max(tl.max(top, axis=2), axis=1)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.sum(total * tl.exp2(top - base[:, None, None]), axis=2), axis=1)
    target = sums_ptr + (pair.to(tl.int64) * splits + split) * SAMPLE_ROWS + line % SAMPLE_ROWS
    tl.store(target, base + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["score_stride", "first_position", "num_tokens", "first_head", "first_block",
                               "num_blocks", "chunk_blocks", "splits"])  # fmt: skip
def _fold_tops(
    tops_ptr, sums_ptr, sinks_ptr, scores_ptr, tops_stride, score_stride, first_position, num_tokens, first_head,
    first_block, num_blocks, chunk_blocks, splits,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A_PAGE: tl.constexpr = PAGE // STRETCH
    PAGES: tl.constexpr = BLOCK // A_PAGE
    GROUP_TOKENS: tl.constexpr = STRETCH * STRETCHES
    head, first, begin = tl.program_id(0), tl.program_id(1) * SAMPLE_BLOCKS, tl.program_id(2) * BLOCK
    line, of_block = tl.arange(0, SAMPLE_BLOCKS * SAMPLE_ROWS), tl.arange(0, SAMPLE_BLOCKS)
    row, block = line % SAMPLE_ROWS, first + line // SAMPLE_ROWS
    start = (first_block + block) * BLOCK_TOKENS
    live = start + row * SAMPLE_EVERY < num_tokens
    ends = (first_position + tl.minimum(start + BLOCK_TOKENS, num_tokens) + GROUP_TOKENS - 1) // GROUP_TOKENS
    ends = tl.where(live, ends, 0)
    if begin >= tl.max(ends, axis=0) * STRETCHES:
        return
    pair = (head * num_blocks + block).to(tl.int64)
    split = tl.arange(0, MOST_SPLITS)
    cells = sums_ptr + (pair[:, None] * splits + split[None, :]) * SAMPLE_ROWS + row[:, None]
    parts = tl.load(cells, mask=live[:, None] & (split < splits)[None, :], other=float("-inf"))
    top = tl.max(parts, axis=1)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + first_head + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    # Queries that are not there weigh nothing.
    base = tl.where(live, top, 0.0)
    total = tl.sum(tl.exp2(parts - base[:, None]), axis=1)
    if sinks_ptr is not None:
        total += tl.exp2(sink - base)
    lse = tl.where(live, base + tl.log2(total), 0.0)
    stretch = begin + tl.arange(0, BLOCK)
    cells = tops_ptr + pair[:, None] * tops_stride + row[:, None] * STRETCHES
    # From ``ends`` on nothing is stored; what a query does not see of a group before is stored as -inf.
    cells += (stretch // STRETCHES * (SAMPLE_ROWS * STRETCHES) + stretch % STRETCHES)[None, :]
    tops = tl.load(cells, mask=(stretch // STRETCHES)[None, :] < ends[:, None], other=float("-inf"))
    mass = tl.sum(tl.exp2(tops.to(tl.float32) - lse[:, None]), axis=0)
    score = tl.log(tl.maximum(tl.sum(tl.reshape(mass, [PAGES, A_PAGE]), axis=1), 1e-30))
    tokens = first_position + tl.minimum((first_block + first + of_block + 1) * BLOCK_TOKENS, num_tokens)
    num_pages = tl.where(first + of_block < num_blocks, (tokens + PAGE - 1) // PAGE, 0)
    score_rows = (first_head + head) * chunk_blocks + first_block + first + of_block
    pages = tl.arange(0, PAGES) + begin // A_PAGE
    target = scores_ptr + score_rows.to(tl.int64)[:, None] * score_stride + pages[None, :]
    mask = pages[None, :] < num_pages[:, None]
    tl.store(target, tl.broadcast_to(score[None, :], [SAMPLE_BLOCKS, PAGES]), mask=mask)


def sample_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    tops: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Score pages for query blocks, in units of log-mass.

    Args:
        q: [num_tokens, q_heads, head_dim], the queries of ``blocks``.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim].
        block_table: int32 [max_pages] of the request.
        blocks: the query blocks.
        geometry: of the layer.
        tops: contiguous, of any dtype, overwritten: ``PrefillBuffers.scratch``, as many heads and blocks at
            once as it holds; sixteen (head, block) at least.
        scores: float32 [q_heads * num_blocks, num_pages], overwritten up to the page of each block's last query.
    """
    page_size, num_tokens, q_heads, head_dim = geometry.page_size, *q.shape
    assert scores.shape == (q_heads * blocks.num_blocks, blocks.num_pages(page_size))
    assert q.stride(2) == kv.stride(3) == scores.stride(1) == block_table.stride(0) == 1
    group, block_d, kv = q_heads // kv.shape[1], triton.next_power_of_2(head_dim), elements_of(kv)
    block_n = max(64, min(128, TUNING["tile_bytes"] // (block_d * kv.element_size())))
    # A tile of heads of 512 is twice as large as others: half of the queries beside one tile fit every GPU.
    wide = block_d > 256
    query_bytes = TUNING["query_bytes"] // (2 if wide else 1)
    # A bundle is heads of one group, so a power of two that divides it; blocks fill the rest of the rows.
    rows = max(1, min(TUNING["rows"], query_bytes // (block_d * q.element_size())) // SAMPLE_ROWS.value)
    heads = min(rows, group & -group)
    of_blocks = rows // heads
    tile_bytes = block_n * block_d * kv.element_size()
    stages = 1 if wide else min(TUNING["num_stages"], 1 + TUNING["query_bytes"] // tile_bytes)
    room, stride = tops.view(-1).view(torch.float16), sample_logits(blocks.end_position + 64)
    pairs = len(room) // sample_room(blocks.end_position + 64)
    least = max(of_blocks, SAMPLE_BLOCKS.value)
    blocks_at_once = min(blocks.num_blocks, max(least, pairs // q_heads // least * least))
    heads_at_once = min(q_heads, pairs // blocks_at_once // heads * heads)
    assert heads_at_once > 0, f"{len(room)} logits hold no {heads} heads and {blocks_at_once} blocks of {stride}"
    for first_block in range(0, blocks.num_blocks, blocks_at_once):
        num_blocks = min(blocks_at_once, blocks.num_blocks - first_block)
        context = blocks.first_position + (first_block + num_blocks) * BLOCK_TOKENS.value
        context = min(context, blocks.end_position)
        for first_head in range(0, q_heads, heads_at_once):
            num_heads = min(heads_at_once, q_heads - first_head)
            grid = num_heads // heads, triton.cdiv(num_blocks, of_blocks)
            wanted = triton.cdiv(TUNING["waves"] * num_multiprocessors(q.device), grid[0] * grid[1])
            splits = min(wanted, most_splits(context))
            sums = room[num_heads * num_blocks * stride :].view(torch.float32)
            _sample_tops[(*grid, splits)](
                q, kv, block_table, room, sums, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2),
                stride, geometry.scale * LOG2_E, geometry.soft_cap * LOG2_E, blocks.first_position, num_tokens,
                first_head, first_block, num_blocks, splits,
                GROUP=group, HEADS=heads, BLOCKS=of_blocks, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE=page_size,
                BLOCK_N=block_n, CODES=kv.element_size() == 1, CAPPED=geometry.soft_cap > 0,
                num_warps=TUNING["num_warps"], num_stages=stages,
            )  # fmt: skip
            parts = triton.cdiv(context, STRETCH.value * FOLD_TUNING["BLOCK"])
            _fold_tops[(num_heads, triton.cdiv(num_blocks, SAMPLE_BLOCKS.value), parts)](
                room, sums, geometry.sink_logits, scores, stride, scores.stride(0), blocks.first_position,
                num_tokens, first_head, first_block, num_blocks, blocks.num_blocks, splits,
                PAGE=page_size, **FOLD_TUNING,
            )  # fmt: skip

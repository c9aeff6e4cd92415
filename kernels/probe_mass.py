"""probe_mass: where the last queries of a chunk put their attention, by page and band of diagonals.

    A[h, i, j]    = softmax_j(scale * q[h, i] . K[j]),  j <= i,  i of the last 64 positions
    band(i, j)    = floor((i - j) / page)
    mass[h, k, p] = sum of A[h, i, j] over j in page p with band(i, j) = first_page - 1 + k - p

Queries of one page meet the keys of one page in two bands, so ``k`` runs over the pages of the
probe plus one: A itself never leaves the chip. The probe ends at the page border (or the 64th token)
at or after the chunk's end; positions past the end have no query, so it is 49 to 64 queries
at page 16. Two passes over the keys: each query's log-sum-exp, split over the context, then the masses.

Definitions: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2 and algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.launch import num_multiprocessors

from vllm_sparse.probe import PROBE_TOKENS, probe_groups, probe_start
from vllm_sparse.query_blocks import QueryBlocks

LOG2_E = 1.4426950408889634
TILE_BYTES = 32768


@triton.jit
def _load_queries(q, q_stride_t, q_stride_h, head, positions, first_position, end_position,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    live = (positions >= first_position) & (positions < end_position)
    rows = tl.where(live, positions - first_position, 0).to(tl.int64)
    query = tl.load(q + rows[:, None] * q_stride_t + head * q_stride_h + dims[None, :],
                    mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
    return query, live


@triton.jit
def _logits(query, live, positions, kv_head_base, block_table, tokens, end_position, kv_stride_b, kv_stride_r,
            scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Scaled logits [rows, tokens], -inf where a query does not see a key."""
    dims = tl.arange(0, BLOCK_D)
    known = tokens < end_position
    block = tl.load(block_table + tokens // PAGE, mask=known, other=0).to(tl.int64)
    cells = kv_head_base + block * kv_stride_b + (tokens % PAGE) * kv_stride_r
    k = tl.load(cells[None, :] + dims[:, None], mask=known[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    logits = tl.dot(query, k, input_precision=PRECISION) * scale_log2
    return tl.where(live[:, None] & (tokens[None, :] <= positions[:, None]), logits, float("-inf"))


@triton.jit(do_not_specialize=["first_position", "end_position", "start", "splits"])
def _probe_lse(
    q, kv, block_table, part_lse, q_stride_t, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_r, lse_stride_h,
    scale_log2, first_position, end_position, start, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    positions = start + tl.arange(0, ROWS)
    query, live = _load_queries(q, q_stride_t, q_stride_h, head, positions, first_position, end_position,
                                HEAD_DIM, BLOCK_D)  # fmt: skip
    base = kv + (head // GROUP).to(tl.int64) * kv_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    tiles = (end_position + BLOCK_N - 1) // BLOCK_N
    per_split = (tiles + splits - 1) // splits
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        logits = _logits(query, live, positions, base, block_table, tokens, end_position, kv_stride_b,
                         kv_stride_r, scale_log2, HEAD_DIM, BLOCK_D, PAGE, PRECISION)  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        peak = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - peak) + tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        top = new_top
    part = part_lse + head * lse_stride_h + split * ROWS + tl.arange(0, ROWS)
    tl.store(part, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("-inf")))


@triton.jit(
    do_not_specialize=[
        "mass_stride_h", "mass_stride_k", "first_position", "end_position", "start", "splits", "num_pages",
    ]
)  # fmt: skip
def _probe_mass(
    q, kv, block_table, part_lse, mass, q_stride_t, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_r,
    lse_stride_h, mass_stride_h, mass_stride_k, scale_log2, first_position, end_position, start, splits, num_pages,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGES_N: tl.constexpr, GROUPS: tl.constexpr,
    BANDS_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, ROWS)
    positions = start + rows
    query, live = _load_queries(q, q_stride_t, q_stride_h, head, positions, first_position, end_position,
                                HEAD_DIM, BLOCK_D)  # fmt: skip
    base = kv + (head // GROUP).to(tl.int64) * kv_stride_h
    part = tl.arange(0, SPLITS_PAD)
    parts = tl.load(part_lse + head * lse_stride_h + part[:, None] * ROWS + rows[None, :],
                    mask=(part < splits)[:, None], other=float("-inf"))  # fmt: skip
    top = tl.max(parts, axis=0)
    peak = tl.where(top == float("-inf"), 0.0, top)
    lse = peak + tl.log2(tl.maximum(tl.sum(tl.exp2(parts - peak[None, :]), axis=0), 1e-30))
    # Which band the queries of a group meet in, as matrices: sums over queries then are products.
    group, band = rows // (ROWS // GROUPS), tl.arange(0, BANDS_PAD)
    near = (band[None, :] == group[:, None] + 1).to(query.dtype)
    far = (band[None, :] == group[:, None]).to(query.dtype)
    dims = tl.arange(0, BLOCK_D)
    tiles = (num_pages + PAGES_N - 1) // PAGES_N
    per_split = (tiles + splits - 1) // splits
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        sums = tl.zeros([PAGES_N, BANDS_PAD], tl.float32)
        for part_start in tl.static_range(0, PAGES_N * PAGE, BLOCK_N):
            tokens = tile * (PAGES_N * PAGE) + part_start + tl.arange(0, BLOCK_N)
            known = tokens < end_position
            block = tl.load(block_table + tokens // PAGE, mask=known, other=0).to(tl.int64)
            cells = base + block * kv_stride_b + (tokens % PAGE) * kv_stride_r
            k = tl.load(
                cells[:, None] + dims[None, :], mask=known[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
            )
            logits = tl.dot(k, tl.trans(query), input_precision=PRECISION) * scale_log2
            seen = live[None, :] & (tokens[:, None] <= positions[None, :])
            weights = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0).to(query.dtype)
            ahead = (positions % PAGE)[None, :] >= (tokens % PAGE)[:, None]
            nothing = tl.zeros_like(weights)
            by_token = tl.dot(tl.where(ahead, weights, nothing), near, input_precision=PRECISION)
            by_token = tl.dot(tl.where(ahead, nothing, weights), far, by_token, input_precision=PRECISION)
            sums += tl.sum(tl.reshape(by_token, [PAGES_N, BLOCK_N // PAGES_N, BANDS_PAD]), axis=1)
        pages = tile * PAGES_N + tl.arange(0, PAGES_N)
        target = mass + head.to(tl.int64) * mass_stride_h + band[None, :] * mass_stride_k + pages[:, None]
        tl.store(target, sums, mask=(band <= GROUPS)[None, :] & (pages < num_pages)[:, None])


def probe_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    scale: float,
    part_lse: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    """Estimate a chunk's attention from its last queries.

    Args:
        q: [num_tokens, q_heads, head_dim], the chunk's queries.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim].
        block_table: int32 [max_pages] of the request.
        chunk: at least 64 tokens of context.
        page_size: tokens per page.
        scale: softmax scale.
        part_lse: float32 [q_heads, splits, 64], overwritten; as many programs share a head's keys.
        mass: float32 [q_heads, groups + 1, num_pages], overwritten.
    """
    _, q_heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    assert q.stride(2) == kv.stride(3) == part_lse.stride(2) == mass.stride(2) == 1
    start = probe_start(chunk, page_size)
    assert start >= 0, f"an estimate needs {PROBE_TOKENS} tokens of context, not {chunk.end_position}"
    groups, num_pages = probe_groups(page_size), chunk.num_pages(page_size)
    block_d = triton.next_power_of_2(head_dim)
    block_n = min(128, TILE_BYTES // (block_d * kv.element_size()))
    pages_n = max(1, block_n // page_size)
    tiles = triton.cdiv(num_pages, pages_n)
    splits = min(part_lse.shape[1], tiles, triton.cdiv(4 * num_multiprocessors(q.device), q_heads))
    shape = dict(
        GROUP=q_heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE=page_size, ROWS=PROBE_TOKENS,
        BLOCK_N=block_n, PRECISION="ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    strides = (q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), part_lse.stride(0))
    extent = (chunk.first_position, chunk.end_position, start, splits)
    _probe_lse[(q_heads, splits)](q, kv, block_table, part_lse, *strides, scale * LOG2_E, *extent, **shape)
    _probe_mass[(q_heads, splits)](
        q, kv, block_table, part_lse, mass, *strides, mass.stride(0), mass.stride(1), scale * LOG2_E, *extent,
        num_pages, PAGES_N=pages_n, GROUPS=groups, BANDS_PAD=max(16, triton.next_power_of_2(groups + 1)),
        SPLITS_PAD=triton.next_power_of_2(splits), **shape,
    )  # fmt: skip

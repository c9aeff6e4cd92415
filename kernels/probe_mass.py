"""probe_mass: where the last queries of a chunk put their attention, by page and band of diagonals.

    A[h, i, j]    = softmax_j(scale * q[h, i] . K[j]),  j <= i,  i of the last 64 positions
    band(i, j)    = floor((i - j) / page)
    mass[h, k, p] = sum of A[h, i, j] over j in page p with band(i, j) = first_page - 1 + k - p

Queries of one page meet the keys of one page in two bands, so ``k`` runs over the pages of the
probe plus one. The probe ends at the page border (or the 64th token) at or after the chunk's end;
positions past the end have no query, so it is 49 to 64 queries at page 16.

One pass over the keys: a softmax needs its sum before its terms can be added over queries, so the
first kernel stores, for each query and page, the sum of both bands against a reference of its own
(16 bits each: an eighth of the bytes of A), and the second weighs and adds them. Query heads of a
group share the keys they read.

Definitions: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2 and algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from vllm_sparse.kernels.constants import PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, stored
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.probe import BUNDLE_HEADS, PROBE_TOKENS, probe_groups, probe_start
from vllm_sparse.pages.query_blocks import QueryBlocks

LOG2_E = 1.4426950408889634
LARGEST: tl.constexpr = tl.constexpr(1e37)
"""Sums against a reference end here, well inside float32 and bfloat16."""
ROWS: tl.constexpr = tl.constexpr(PROBE_TOKENS)
QUERY_BYTES = 65536
"""Most that the queries of a bundle of heads take of shared memory."""
TUNING = {
    "heads": BUNDLE_HEADS,
    "block_tokens": 64,
    "tile_bytes": 16384,
    "num_warps": 4,
    "num_stages": 2,
    "fold_tiles": 16,
}


@triton.jit
def _products(query, kv_head_ptr, block_table_ptr, tokens, end_position, kv_stride_b, kv_stride_slot,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """``query`` [lines, head_dim] times the keys of ``tokens``: float32 [lines, tokens]."""
    dims = tl.arange(0, BLOCK_D)
    known = tokens < end_position
    block = tl.load(block_table_ptr + tokens // PAGE, mask=known, other=0).to(tl.int64)
    keys = kv_head_ptr + block * kv_stride_b + (tokens % PAGE) * kv_stride_slot
    k = tl.load(keys[None, :] + dims[:, None], mask=known[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    return tl.dot(query, stored(k, query.dtype), input_precision=PRECISION)


@triton.jit
def _add_tiles(
    begin, end, total, query, live, positions, reference, kv_head_ptr, block_table_ptr, parts_ptr, end_position,
    kv_stride_b, kv_stride_slot, tile_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr, STORED: tl.constexpr, SUM_DTYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store what each query puts on the pages of tiles begin..end: of their far band, then of the near one."""
    column, lane = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_N)
    # Sums over a page's tokens as products: all of them into its far column, then the near ones over to
    # its near column. Every instruction here is run once per query and key.
    far_column = column[None, :] == (lane // PAGE)[:, None]
    near_column = column[None, :] - STORED // 2 == (lane // PAGE)[:, None]
    of_all = far_column.to(SUM_DTYPE)
    of_near = near_column.to(SUM_DTYPE) - of_all
    row_in_page = positions % PAGE
    near = (row_in_page[:, None] >= (lane % PAGE)[None, :]).to(tl.float32)
    for tile in range(begin, end):
        tokens = tile * BLOCK_N + lane
        products = _products(query, kv_head_ptr, block_table_ptr, tokens, end_position, kv_stride_b,
                             kv_stride_slot, HEAD_DIM, BLOCK_D, PAGE)  # fmt: skip
        weights = tl.exp2(products * scale_log2 - reference[:, None])
        if MASKED:
            weights = tl.where(live[:, None] & (tokens[None, :] <= positions[:, None]), weights, 0.0)
        if PAGE > BLOCK_N:
            near = (row_in_page[:, None] >= (tile * BLOCK_N % PAGE + lane)[None, :]).to(tl.float32)
        sums = tl.dot(weights.to(SUM_DTYPE), of_all, input_precision=PRECISION)
        # A product, not a choice, which the compiler would make on pairs of 16-bit numbers.
        sums = tl.dot((weights * near).to(SUM_DTYPE), of_near, sums, input_precision=PRECISION)
        # Weights past float32 make a tile's sums infinite or no number at all: then each is the largest.
        sums = tl.where(sums <= LARGEST, tl.maximum(sums, 0.0), LARGEST)
        total += tl.sum(sums, axis=1)
        tl.store(parts_ptr + tile * tile_stride + column[None, :], sums.to(parts_ptr.dtype.element_ty),
                 mask=(column < STORED)[None, :])  # fmt: skip
    return total


@triton.jit(do_not_specialize=["first_position", "end_position", "start", "first_head", "tiles", "splits"])
def _probe_parts(
    q_ptr, kv_ptr, block_table_ptr, parts_ptr, part_lse_ptr, q_stride_t, q_stride_h, kv_stride_b, kv_stride_h,
    kv_stride_slot, scale_log2, first_position, end_position, start, first_head, tiles, splits,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    bundle, split = tl.program_id(0), tl.program_id(1)
    line = tl.arange(0, HEADS * ROWS)
    row, of_bundle = line % ROWS, bundle * HEADS + line // ROWS
    # A multiple of the page size or of the rows, which lets the compiler see where in a page a row lies.
    start = tl.multiple_of(start, PAGE if PAGE < ROWS else ROWS)
    positions = start + row
    live = (positions >= first_position) & (positions < end_position)
    dims = tl.arange(0, BLOCK_D)
    token = tl.where(live, positions - first_position, 0).to(tl.int64)
    head_queries = q_ptr + (first_head + of_bundle)[:, None] * q_stride_h
    query = tl.load(head_queries + token[:, None] * q_stride_t + dims[None, :],
                    mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
    cells = kv_ptr + ((first_head + bundle * HEADS) // GROUP).to(tl.int64) * kv_stride_h
    per_split = (tiles + splits - 1) // splits
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, tiles)
    # Tiles up to here hold no key that a query of the probe does not see.
    common = tl.minimum(tl.maximum(tl.maximum(start, first_position) // BLOCK_N, begin), end)
    tokens = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    first = _products(query, cells, block_table_ptr, tokens, end_position, kv_stride_b, kv_stride_slot,
                      HEAD_DIM, BLOCK_D, PAGE)  # fmt: skip
    # A row that sees nothing of the first tile sees nothing of later ones.
    reference = tl.max(tl.where(tokens[None, :] <= positions[:, None], first, -LARGEST), axis=1)
    reference = tl.where(live & (reference > -LARGEST), reference * scale_log2, 0.0)
    head_parts = parts_ptr + (of_bundle.to(tl.int64) * tiles * ROWS + row)[:, None] * STORED
    total = tl.zeros([HEADS * ROWS], tl.float32)
    total = _add_tiles(begin, common, total, query, live, positions, reference, cells, block_table_ptr, head_parts,
                       end_position, kv_stride_b, kv_stride_slot, ROWS * STORED, scale_log2, HEAD_DIM, BLOCK_D,
                       PAGE, BLOCK_N, COLUMNS, STORED, SUM_DTYPE, False)  # fmt: skip
    total = _add_tiles(common, end, total, query, live, positions, reference, cells, block_table_ptr, head_parts,
                       end_position, kv_stride_b, kv_stride_slot, ROWS * STORED, scale_log2, HEAD_DIM, BLOCK_D,
                       PAGE, BLOCK_N, COLUMNS, STORED, SUM_DTYPE, True)  # fmt: skip
    total = tl.minimum(total, LARGEST)
    seen = live & (total > 0)
    target = part_lse_ptr + ((of_bundle * splits + split) * 2 * ROWS + row)
    # A row that saw nothing weighs nothing, however small the rest of its softmax is.
    tl.store(target, tl.where(seen, reference, float("-inf")))
    tl.store(target + ROWS, tl.where(seen, reference + tl.log2(tl.maximum(total, 1e-37)), float("-inf")))


@triton.jit(do_not_specialize=["mass_stride_h", "mass_stride_k", "num_pages", "first_head", "tiles", "splits"])
def _fold_rows(
    parts_ptr, part_lse_ptr, mass_ptr, mass_stride_h, mass_stride_k, num_pages, first_head, tiles, splits,
    STORED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr, TILES_A_PAGE: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    row, of_split = tl.arange(0, ROWS), tl.arange(0, SPLITS_PAD)
    lse_row = part_lse_ptr + head * splits * 2 * ROWS + row
    ends = tl.load(lse_row[None, :] + of_split[:, None] * 2 * ROWS + ROWS,
                   mask=(of_split < splits)[:, None], other=float("-inf"))  # fmt: skip
    top = tl.max(ends, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log2(tl.maximum(tl.sum(tl.exp2(ends - top[None, :]), axis=0), 1e-37))
    empty = tl.max(ends, axis=0) == float("-inf")
    PAGES: tl.constexpr = STORED // 2
    per_split = (tiles + splits - 1) // splits
    tile = block * TILES + tl.arange(0, TILES)
    column = tl.arange(0, PAGES)
    reference = tl.load(lse_row[None, :] + (tile // per_split)[:, None] * 2 * ROWS,
                        mask=(tile < tiles)[:, None], other=float("-inf"))  # fmt: skip
    weight = tl.where(empty[None, :], 0.0, tl.exp2(reference - lse[None, :]))
    cell = parts_ptr + ((head.to(tl.int64) * tiles + tile)[:, None, None] * ROWS + row[None, :, None]) * STORED
    mask = (tile < tiles)[:, None, None] & ~empty[None, :, None]
    far = tl.load(cell + column[None, None, :], mask=mask, other=0.0).to(tl.float32) * weight[:, :, None]
    near = tl.load(cell + PAGES + column[None, None, :], mask=mask, other=0.0).to(tl.float32) * weight[:, :, None]
    group = tl.arange(0, GROUPS)
    far = tl.sum(tl.reshape(far, [TILES, GROUPS, ROWS // GROUPS, PAGES]), axis=2)
    near = tl.sum(tl.reshape(near, [TILES, GROUPS, ROWS // GROUPS, PAGES]), axis=2)
    if TILES_A_PAGE > 1:
        far = tl.sum(tl.reshape(far, [TILES // TILES_A_PAGE, TILES_A_PAGE, GROUPS, PAGES]), axis=1)
        near = tl.sum(tl.reshape(near, [TILES // TILES_A_PAGE, TILES_A_PAGE, GROUPS, PAGES]), axis=1)
    page = (block * (TILES // TILES_A_PAGE) + tl.arange(0, TILES // TILES_A_PAGE))[:, None] * PAGES + column[
        None, :
    ]
    target = mass_ptr + (first_head + head).to(tl.int64) * mass_stride_h + page
    for k in tl.static_range(GROUPS + 1):
        meets = tl.where(group[None, :, None] == k, far, 0.0)
        meets += tl.where(group[None, :, None] + 1 == k, near, 0.0)
        tl.store(target + k * mass_stride_k, tl.sum(meets, axis=1), mask=page < num_pages)


def probe_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    chunk: QueryBlocks,
    geometry: Geometry,
    part_lse: torch.Tensor,
    parts: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    """Estimate a chunk's attention from its last queries.

    Args:
        q: [num_tokens, q_heads, head_dim], the chunk's queries.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim].
        block_table: int32 [max_pages] of the request.
        chunk: at least 64 tokens of context.
        geometry: of the layer.
        part_lse: float32 [q_heads, splits, 2, 64], overwritten; at most ``splits`` programs share a head's keys.
        parts: contiguous, of any dtype, overwritten: ``PrefillBuffers.scratch``, as many heads at once as it
            holds.
        mass: float32 [q_heads, groups + 1, num_pages], overwritten.
    """
    page_size, scale = geometry.page_size, geometry.scale
    _, q_heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    assert q.stride(2) == kv.stride(3) == mass.stride(2) == 1 and part_lse.is_contiguous()
    start = probe_start(chunk, page_size)
    assert start >= 0, f"an estimate needs {PROBE_TOKENS} tokens of context, not {chunk.end_position}"
    groups, num_pages = probe_groups(page_size), chunk.num_pages(page_size)
    group, block_d = q_heads // kv_heads, triton.next_power_of_2(head_dim)
    # A bundle is heads of one group, so a power of two that divides it.
    heads = max(
        1, min(TUNING["heads"], group & -group, QUERY_BYTES // (PROBE_TOKENS * block_d * q.element_size()))
    )
    block_n = min(TUNING["block_tokens"], TUNING["tile_bytes"] // (block_d * q.element_size()))
    pages_n, tiles_a_page = max(1, block_n // page_size), max(1, page_size // block_n)
    tiles = num_pages * tiles_a_page if tiles_a_page > 1 else triton.cdiv(num_pages, pages_n)
    stored = 2 * pages_n
    exact = q.dtype == torch.float32
    # bfloat16 has the exponents of float32, which weights against a mere reference need.
    room = parts.view(-1).view(torch.float32 if exact else torch.bfloat16)
    # Triton's interpreter multiplies bfloat16 wrongly.
    sum_dtype = tl.float32 if exact or isinstance(_probe_parts, InterpretedFunction) else tl.bfloat16
    at_once = min(q_heads, room.shape[0] // (tiles * PROBE_TOKENS * stored) // heads * heads)
    assert at_once > 0, f"{room.shape[0]} elements hold no {heads} heads of {tiles} tiles"
    fold_tiles = max(TUNING["fold_tiles"], tiles_a_page)
    for first_head in range(0, q_heads, at_once):
        count = min(at_once, q_heads - first_head)
        wanted = triton.cdiv(2 * num_multiprocessors(q.device), count // heads)
        splits = min(part_lse.shape[1], tiles, wanted)
        _probe_parts[(count // heads, splits)](
            q, elements_of(kv), block_table, room, part_lse, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1),
            kv.stride(2), scale * LOG2_E, chunk.first_position, chunk.end_position, start, first_head, tiles,
            splits,
            GROUP=group, HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE=page_size, BLOCK_N=block_n,
            STORED=stored, COLUMNS=max(16, stored), SUM_DTYPE=sum_dtype,
            num_warps=min(TUNING["num_warps"], 4 * heads), num_stages=TUNING["num_stages"],
        )  # fmt: skip
        _fold_rows[(count, triton.cdiv(tiles, fold_tiles))](
            room, part_lse, mass, mass.stride(0), mass.stride(1), num_pages, first_head, tiles, splits,
            STORED=stored, GROUPS=groups, TILES=fold_tiles, TILES_A_PAGE=tiles_a_page,
            # The same at every context: nothing is compiled for a longer one.
            SPLITS_PAD=triton.next_power_of_2(part_lse.shape[1]),
            num_warps=4,
        )  # fmt: skip

"""sketch_score: estimates of a page's attention mass from low-bit sketches of all its keys.

    score[h, p] = log sum_{t in p} exp(scale * q[h] . key_t + noise * (scale * |q[h]| * scale_t)^2 / 2)

with the keys and their scales that :mod:`vllm_sparse.kernels.sketch_write` has stored. The second term is what
the exponential of a logit gains on average by what its code has lost, a variance of ``noise * scale_t^2`` in
each channel (:mod:`vllm_sparse.pages.summaries`): without it pages of widely spread keys rank too low. Tiles that
a request has not filled have no sketch and count nothing: their page is attended whatever its score.

The query is rotated as the keys are and quantised in two int8 digits to base 128; bytes of the sketch, masked to
one key's field, are int8 operands of matrix products: to unpack a code is one bitwise operation on four channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import TILE
from vllm_sparse.kernels.hadamard import hadamard
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.kernels.query_tokens import mean_query
from vllm_sparse.kernels.store_scores import store_chunk, store_scores
from vllm_sparse.kernels.two_digits import two_digits
from vllm_sparse.kernels.work_list import CHUNK_ENDS, COLUMNS, begin_of, chunks_of, entry_of, first_ends, row_of
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores
from vllm_sparse.pages.summaries import TILE_TOKENS, SketchLayout

TUNING = {"waves": 2, "step_bytes": 32768, "num_warps": 2, "num_stages": 5}
"""``step_bytes``: of sketches that a program has in flight per stage."""
LARGEST: tl.constexpr = tl.constexpr(124.0)
"""Powers of two that residuals add to a mass at most, inside float32: no running maximum is needed, as the
residuals of a tile add up to nothing, so that its largest logit is not far below that of its mean."""


@triton.jit
def _products(rows, digits):
    """``rows`` int8 [pages, dims] times 128 times what ``digits`` stand for, float32 [pages, group]."""
    both = tl.dot(rows, digits, out_dtype=tl.int32)
    high, low = tl.split(both.reshape(both.shape[0], both.shape[1] // 2, 2))
    return (high * 128 + low).to(tl.float32)


@triton.jit
def _columns(words):
    """The first nine columns of ``words`` [pages, 16], each [pages]: parts of a row that one thread holds."""
    even, odd = tl.split(words.reshape(words.shape[0], 2, 2, 2, 2))
    fours, twos = tl.split(even)
    ones, threes = tl.split(odd)
    eights, w4 = tl.split(fours)
    w2, w6 = tl.split(twos)
    w1, w5 = tl.split(ones)
    w3, w7 = tl.split(threes)
    w0, w8 = tl.split(eights)
    return (w0, tl.split(w1)[0], tl.split(w2)[0], tl.split(w3)[0], tl.split(w4)[0], tl.split(w5)[0],
            tl.split(w6)[0], tl.split(w7)[0], w8)  # fmt: skip


@triton.jit
def _weights(packed, digits, steps, offsets, gains, scale_bits, FIELD: tl.constexpr, BITS: tl.constexpr):
    """2 to the power of what residuals in field ``FIELD`` of ``packed`` add to logits: float32 [pages, group]."""
    scale = scale_bits.to(tl.float32, bitcast=True)
    LEVELS: tl.constexpr = 1 << BITS
    IS_LAST: tl.constexpr = FIELD == 8 // BITS - 1
    # The last field is read with the byte's sign.
    MASK: tl.constexpr = -(128 >> (BITS - 1)) if IS_LAST else (LEVELS - 1) << (FIELD * BITS)
    CENTRE: tl.constexpr = 0.5 - LEVELS / 2 + (LEVELS / 2 if IS_LAST else 0)
    WEIGHT: tl.constexpr = 1 / (1 << (FIELD * BITS))
    field = packed & tl.full([1, 1], MASK, tl.int8)
    level = _products(field, digits) * (steps * WEIGHT)[None, :] + (offsets * CENTRE)[None, :]
    return tl.exp2((level + scale[:, None] * gains[None, :]) * scale[:, None])


@triton.jit
def _rotated_query(
    source_ptr, starts_ptr, request, stride_token, dims, member, scale, noise,
    GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A request's query as sketches meet it: digits int8 [dims, 2 * group], and float32 [group] of its heads.

    Those are steps of the digits, offsets that all keys add, and gains of the noise that codes have.
    """
    query, _ = mean_query(
        source_ptr[:, None] + dims[None, :], starts_ptr, request, stride_token,
        member[:, None] & (dims < HEAD_DIM)[None, :],
    )  # fmt: skip
    # A rotated query adds up to its first channel before, times the root of the width; no channel of it is
    # larger than its length.
    first, _ = mean_query(source_ptr, starts_ptr, request, stride_token, member)
    square = tl.sum(query * query, axis=1)
    steps = tl.maximum(tl.sqrt(square) / 127, 1e-30)
    digits = two_digits(tl.trans(hadamard(query * (WIDTH**-0.5 / steps)[:, None], GROUP_PAD, WIDTH)))
    # Logits to base 2, for each unit of what _products returns.
    offsets = first * (scale * 1.4426950408889634 * WIDTH**0.5)
    gains = steps * steps * (127.0 * 127.0 * scale * scale * noise * (1.4426950408889634 / 2))
    steps *= scale * (1.4426950408889634 / 128)
    return digits, steps, offsets, gains


@triton.jit
def _tile_masses(
    cells, words, pages, tile, seq_len, live, digits, steps, offsets, gains,
    GROUP_PAD: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Logarithms to base 2 of what the keys of a tile weigh in each of ``PAGES`` pages, float32 [pages, group].

    -inf where the request has not filled the tile: whatever lies there is not a sketch of its keys.
    """
    PLANES: tl.constexpr = TILE * BITS // 8
    FIELDS: tl.constexpr = 8 // BITS
    mean = tl.load(cells + PLANES * WIDTH, mask=live[:, None], other=0)
    filled = live & (pages * PAGE + tile * TILE + TILE <= seq_len)
    scales = _columns(tl.load(words, mask=filled[:, None], other=0))
    mean_scale = scales[8].to(tl.float32, bitcast=True)
    centre = _products(mean, digits) * steps[None, :] * mean_scale[:, None]
    total_weight = tl.zeros([PAGES, GROUP_PAD], tl.float32)
    for plane in tl.static_range(PLANES):
        packed = tl.load(cells + plane * WIDTH, mask=live[:, None], other=0)
        for pair in tl.static_range(FIELDS // 2):
            two = scales[plane * FIELDS // 2 + pair]
            total_weight += _weights(packed, digits, steps, offsets, gains, two << 16, 2 * pair, BITS)
            total_weight += _weights(packed, digits, steps, offsets, gains, two & -65536, 2 * pair + 1, BITS)
    mass = centre + tl.minimum(tl.log2(total_weight), LARGEST)
    return tl.where(filled[:, None], mass, float("-inf"))


@triton.jit(do_not_specialize=["num_reqs", "noise"])
def _sketch_score(
    q_ptr, starts_ptr, kv_bytes_ptr, kv_words_ptr, block_table_ptr, work_ptr, totals_ptr, values_ptr,
    chunk_lse_ptr, q_stride_token, q_stride_h, byte_stride_b, byte_stride_h, byte_stride_slot, table_stride,
    score_stride, chunk_stride, num_reqs, scale, noise,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, TILE_BYTES: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, TILES: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = TILE * BITS // 8
    program, head = tl.program_id(0), tl.program_id(1)
    ends = first_ends(work_ptr, num_reqs, CHUNK_ENDS)
    chunk, last_chunk = chunks_of(program, totals_ptr)
    if chunk >= last_chunk:
        return
    row = row_of(chunk, ends, work_ptr, num_reqs, CHUNK_ENDS)
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, WIDTH)
    heads = head * GROUP + group
    sketches = head.to(tl.int64) * byte_stride_h + PAGE * byte_stride_slot
    while chunk < last_chunk:
        request, seq_len, offset = entry_of(work_ptr, row)
        begin = begin_of(work_ptr, row, CHUNK_ENDS)
        end = tl.minimum(tl.load(work_ptr + row * COLUMNS + CHUNK_ENDS), last_chunk)
        num_pages = (seq_len + PAGE - 1) // PAGE
        digits, steps, offsets, gains = _rotated_query(
            q_ptr + heads * q_stride_h, starts_ptr, request, q_stride_token, dims, group < GROUP, scale, noise,
            GROUP_PAD, HEAD_DIM, WIDTH,
        )  # fmt: skip
        block_row = block_table_ptr + request.to(tl.int64) * table_stride
        page_top = tl.full([PAGES, GROUP_PAD], float("-inf"), tl.float32)
        page_sum = tl.zeros([PAGES, GROUP_PAD], tl.float32)
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        # Stages asked for here count for loads that feed no matrix product too.
        for step in tl.range((chunk - begin) * STEPS, (end - begin) * STEPS, num_stages=STAGES):
            tile = step % TILES
            of_row = step // STEPS
            pages = step // TILES * PAGES + tl.arange(0, PAGES)
            live = pages < num_pages
            blocks = tl.load(block_row + pages, mask=live, other=0).to(tl.int64) * byte_stride_b
            start = blocks + sketches + tile * TILE_BYTES
            cells = kv_bytes_ptr + start[:, None] + dims[None, :]
            words = kv_words_ptr + (start // 4 + (PLANES + 1) * WIDTH // 4)[:, None] + tl.arange(0, TILE)[None, :]
            mass = _tile_masses(
                cells, words, pages, tile, seq_len, live, digits, steps, offsets, gains,
                GROUP_PAD, WIDTH, BITS, PAGE, PAGES,
            )  # fmt: skip
            if TILES > 1:
                page_top = tl.where(tile == 0, float("-inf"), page_top)
                page_sum = tl.where(tile == 0, 0.0, page_sum)
                new_top = tl.maximum(page_top, mass)
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                page_sum = page_sum * tl.exp2(page_top - base) + tl.exp2(mass - base)
                page_top = new_top
                mass = page_top + tl.log2(page_sum)
                live = pages < tl.where(tile == TILES - 1, num_pages, 0)
            begins = step % STEPS == 0
            top, total = tl.where(begins, float("-inf"), top), tl.where(begins, 0.0, total)
            top, total = store_scores(
                values_ptr, tl.trans(mass * 0.6931471805599453), heads, group < GROUP, offset, pages, live,
                score_stride, top, total,
            )  # fmt: skip
            store_chunk(chunk_lse_ptr, heads, group < GROUP, offset, request, of_row, chunk_stride, top, total)
        chunk = end
        row += 1


def sketch_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    summary: str,
) -> None:
    """Score pages by the sketches of their keys; ``summary`` is ``sketch1`` or ``sketch2``, the rest as in
    :meth:`vllm_sparse.policies.base.DecodePolicy.score`.

    Reads ``(2 * bits + 1) * width + 64`` bytes per 16 tokens and KV head, with the head size padded to a
    power of two ``width``.
    """
    page_size, scale = geometry.page_size, geometry.scale
    (q_heads, head_dim), num_reqs = q.shape[1:], len(block_table)
    kv_heads, item_bytes = kv.shape[1], kv.element_size()
    group = q_heads // kv_heads
    layout = SketchLayout.of(summary, head_dim)
    tiles = page_size // TILE_TOKENS
    assert q.stride(2) == kv.stride(3) == 1
    assert (kv.shape[2] - page_size) * 2 * head_dim * item_bytes >= tiles * layout.tile_bytes, (
        f"the pages of this cache have no room for {summary}"
    )
    chunks = num_reqs * triton.cdiv(block_table.shape[1], CHUNK_PAGES)
    programs = min(chunks, triton.cdiv(TUNING["waves"] * num_multiprocessors(q.device), kv_heads))
    pages = TUNING["step_bytes"] // ((layout.planes + 1) * layout.width)
    pages = min(CHUNK_PAGES, max(16, 1 << (pages.bit_length() - 1)))
    _sketch_score[(programs, kv_heads)](
        q, plan.queries.starts, kv.view(torch.int8), kv.view(torch.int32), block_table, plan.work, plan.totals,
        scores.values, scores.chunk_lse, q.stride(0), q.stride(1),
        *(stride * item_bytes for stride in kv.stride()[:3]), block_table.stride(0),
        scores.values.stride(0), scores.chunk_lse.stride(0), num_reqs, scale, layout.noise,
        GROUP=group, GROUP_PAD=max(4, triton.next_power_of_2(group)), HEAD_DIM=head_dim, WIDTH=layout.width,
        BITS=layout.bits, TILE_BYTES=layout.tile_bytes, PAGE=page_size, PAGES=pages,
        TILES=tiles, STEPS=CHUNK_PAGES // pages * tiles,
        STAGES=TUNING["num_stages"],
        num_warps=TUNING["num_warps"],
    )  # fmt: skip

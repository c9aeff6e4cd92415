"""range_score: estimates of a page's largest logit from its per-channel key range.

    score[h, p] = scale * (q[h] . centre[p] + slack * |q[h]| . half_width[p])

With slack 1 it is Quest's upper bound, sum_d max(q_d min_d, q_d max_d) (arXiv 2406.10774). Centre and
half width are int8 (:mod:`vllm_sparse.kernels.page_write` has the format), and so is the query, in two
digits to base 128: two int8 matrix products with the bytes of the summary slot. Turning those bytes
into floats first took longer than reading them, and so did asking for scales after the bytes had come:
they are read one chunk ahead.

A page that a request has not filled has no summary and gets a score of -inf: it is attended whatever its score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK
from vllm_sparse.kernels.launch import num_multiprocessors
from vllm_sparse.kernels.query_tokens import mean_query
from vllm_sparse.kernels.store_scores import store_chunk, store_scores
from vllm_sparse.kernels.two_digits import two_digits
from vllm_sparse.kernels.work_list import CHUNK_ENDS, COLUMNS, begin_of, chunks_of, entry_of, first_ends, row_of
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores

TUNING = {"waves": 4, "num_warps": 2, "num_stages": 2}


@triton.jit
def _products(rows, digits, steps):
    """``rows`` int8 [pages, dims] times what ``digits`` stand for, float32 [pages, group]."""
    both = tl.dot(rows, digits, out_dtype=tl.int32)
    high, low = tl.split(both.reshape(both.shape[0], both.shape[1] // 2, 2))
    return (high.to(tl.float32) + low.to(tl.float32) * 0.0078125) * steps[None, :]


@triton.jit
def _scale_words(words_ptr, block_row_ptr, pages, live, block_words, width_words):
    """The first 16 bytes of centres and of half widths, int32 [pages, 4]: their lowest bits are the scales."""
    blocks = tl.load(block_row_ptr + pages, mask=live, other=0).to(tl.int64)
    words = words_ptr + (blocks * block_words)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(words, mask=live[:, None], other=0), tl.load(words + width_words, mask=live[:, None], other=0)


@triton.jit
def _scales(words):
    """What the lowest bits of 16 bytes, int32 [pages, 4], stand for: float32 [pages]."""
    # The product brings the lowest bits of a word's four bytes side by side.
    fours = (((words & 0x01010101) * 0x01020408) >> 24) & 15
    bits = tl.sum(fours << (4 * tl.arange(0, 4))[None, :], axis=1)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_reqs", "slack"])
def _range_score(
    q_ptr, starts_ptr, kv_bytes_ptr, kv_words_ptr, block_table_ptr, work_ptr, totals_ptr, values_ptr,
    chunk_lse_ptr, q_stride_token, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_slot, table_stride,
    score_stride, chunk_stride, num_reqs, scale, slack,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, ITEM_BYTES: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    ends = first_ends(work_ptr, num_reqs, CHUNK_ENDS)
    chunk, last_chunk = chunks_of(program, totals_ptr)
    if chunk >= last_chunk:
        return
    row = row_of(chunk, ends, work_ptr, num_reqs, CHUNK_ENDS)
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, BLOCK_D)
    heads = head * GROUP + group
    summary_row = head.to(tl.int64) * kv_stride_h + PAGE * kv_stride_slot
    summaries = kv_bytes_ptr + summary_row * ITEM_BYTES + dims[None, :]
    words = kv_words_ptr + summary_row * ITEM_BYTES // 4
    block_words = kv_stride_b * ITEM_BYTES // 4
    lanes = tl.arange(0, CHUNK)
    while chunk < last_chunk:
        request, seq_len, offset = entry_of(work_ptr, row)
        begin = begin_of(work_ptr, row, CHUNK_ENDS)
        end = tl.minimum(tl.load(work_ptr + row * COLUMNS + CHUNK_ENDS), last_chunk)
        num_pages = (seq_len + PAGE - 1) // PAGE
        query, size = mean_query(
            q_ptr + heads[None, :] * q_stride_h + dims[:, None], starts_ptr, request, q_stride_token,
            (group < GROUP)[None, :] & (dims < HEAD_DIM)[:, None],
        )  # fmt: skip
        signed = tl.zeros([BLOCK_D, 2 * GROUP_PAD], tl.int8)
        sizes, steps = signed, tl.zeros([GROUP_PAD], tl.float32)
        block_row = block_table_ptr + request.to(tl.int64) * table_stride
        last = end - begin
        pages = (chunk - begin) * CHUNK + lanes
        c_words, w_words = _scale_words(words, block_row, pages, pages < num_pages, block_words, HEAD_DIM // 4)
        for of_row in range(chunk - begin, last):
            if of_row == chunk - begin:
                # Here, where the first loads of the loop are on their way.
                steps = tl.maximum(tl.max(size, axis=0) / 127, 1e-30)
                signed, sizes = two_digits(query / steps[None, :]), two_digits(size / steps[None, :])
                steps *= scale
            pages = of_row * CHUNK + lanes
            live = pages < num_pages
            blocks = tl.load(block_row + pages, mask=live, other=0).to(tl.int64) * kv_stride_b
            cells = summaries + (blocks * ITEM_BYTES)[:, None]
            mask = live[:, None] if HEAD_DIM == BLOCK_D else live[:, None] & (dims < HEAD_DIM)[None, :]
            centre = tl.load(cells, mask=mask, other=0)
            width = tl.load(cells + HEAD_DIM, mask=mask, other=0)
            c_scale, w_scale = _scales(c_words), _scales(w_words) * slack
            ahead = pages + CHUNK
            more = ahead < tl.minimum(num_pages, last * CHUNK)
            c_words, w_words = _scale_words(words, block_row, ahead, more, block_words, HEAD_DIM // 4)
            bound = (_products(centre, signed, steps) * c_scale[:, None]
                     + _products(width, sizes, steps) * w_scale[:, None])  # fmt: skip
            bound = tl.where(((pages + 1) * PAGE <= seq_len)[:, None], bound, float("-inf"))
            top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
            total = tl.zeros([GROUP_PAD], tl.float32)
            top, total = store_scores(
                values_ptr, tl.trans(bound), heads, group < GROUP, offset, pages, live, score_stride, top, total
            )
            store_chunk(chunk_lse_ptr, heads, group < GROUP, offset, request, of_row, chunk_stride, top, total)
        chunk = end
        row += 1


def range_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    slack: float = 1.0,
) -> None:
    """Score pages by their key range, ``slack`` from its centre (0) to its bound (1); the rest as in
    :meth:`vllm_sparse.policies.base.DecodePolicy.score`.

    Reads ``2 * head_dim`` bytes per page and KV head.
    """
    page_size, scale = geometry.page_size, geometry.scale
    (q_heads, head_dim), num_reqs = q.shape[1:], len(block_table)
    kv_heads = kv.shape[1]
    group = q_heads // kv_heads
    assert q.stride(2) == kv.stride(3) == 1
    assert kv.shape[2] > page_size, "the pages of this cache hold no summary"
    chunks = num_reqs * triton.cdiv(block_table.shape[1], CHUNK_PAGES)
    programs = min(chunks, triton.cdiv(TUNING["waves"] * num_multiprocessors(q.device), kv_heads))
    _range_score[(programs, kv_heads)](
        q, plan.queries.starts, kv.view(torch.int8), kv.view(torch.int32), block_table, plan.work, plan.totals,
        scores.values, scores.chunk_lse,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), block_table.stride(0),
        scores.values.stride(0), scores.chunk_lse.stride(0), num_reqs, scale, slack,
        GROUP=group, GROUP_PAD=max(4, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size,
        ITEM_BYTES=kv.element_size(),
        num_warps=TUNING["num_warps"], num_stages=TUNING["num_stages"],
    )  # fmt: skip

"""quest_score: estimates of a page's largest logit from its per-channel key range.

    centre = (min[p] + max[p]) / 2,  half = (max[p] - min[p]) / 2
    score[h, p] = scale * (q[h] . centre + slack * |q[h]| . half)
                = scale * [q[h] - slack |q[h]| | q[h] + slack |q[h]|] / 2 . [min[p] | max[p]]

With slack 1 it is Quest's upper bound, sum_d max(q_d min_d, q_d max_d) (arXiv 2406.10774). The last
form is one matrix product with the summary row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.launch import page_splits
from vllm_sparse.kernels.store_scores import store_chunk, store_scores

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.page_scores import CHUNK_PAGES, PageScores

TILE_BYTES = 32768
TUNING = {"waves": 8, "num_warps": 4, "num_stages": 2}
"""Chosen from benchmarks/results/sweep.jsonl: an H100, an earlier commit of these kernels."""


@triton.jit(do_not_specialize=["slack"])
def _quest_score(
    q, kv, block_table, seq_lens, score_offsets, values, chunk_lse, q_stride_r, q_stride_h,
    kv_stride_b, kv_stride_h, kv_stride_r, table_stride, score_stride, chunk_stride, scale, slack,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(score_offsets + request)
    seq_len = tl.load(seq_lens + request)
    if (offset < 0) | (seq_len == 0):
        return
    num_pages = (seq_len + PAGE - 1) // PAGE
    if split * CHUNK >= num_pages:
        return
    group = tl.arange(0, GROUP_PAD)
    content = tl.arange(0, BLOCK_C)
    in_row = content < 2 * HEAD_DIM
    heads = head * GROUP + group
    query = q + request.to(tl.int64) * q_stride_r + heads[:, None] * q_stride_h + (content % HEAD_DIM)[None, :]
    query = tl.load(query, mask=(group < GROUP)[:, None] & in_row[None, :], other=0.0)
    # With slack 1 minima meet the negative part of q and maxima the positive: exact in any dtype.
    side = tl.where(content < HEAD_DIM, -slack, slack)[None, :]
    wide = query.to(tl.float32)
    query = ((wide + side * tl.abs(wide)) * 0.5).to(query.dtype)
    summaries = kv + head.to(tl.int64) * kv_stride_h + PAGE * kv_stride_r + content[:, None]
    block_row = block_table + request.to(tl.int64) * table_stride
    for chunk in range(split, (num_pages + CHUNK - 1) // CHUNK, tl.num_programs(0)):
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        for start in tl.static_range(0, CHUNK, BLOCK_P):
            pages = chunk * CHUNK + start + tl.arange(0, BLOCK_P)
            live = pages < num_pages
            blocks = tl.load(block_row + pages, mask=live, other=0).to(tl.int64)
            rows = tl.load(
                summaries + blocks[None, :] * kv_stride_b, mask=live[None, :] & in_row[:, None], other=0.0
            )
            bound = tl.dot(query, rows, input_precision=PRECISION) * scale
            top, total = store_scores(
                values, bound, heads, group < GROUP, offset, pages, live, score_stride, top, total
            )
        store_chunk(chunk_lse, heads, group < GROUP, offset, request, chunk, chunk_stride, top, total, CHUNK)


def quest_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    page_size: int,
    scale: float,
    scores: PageScores,
    slack: float = 1.0,
) -> None:
    """Score pages by their key range, ``slack`` from its centre (0) to its bound (1); the rest as in
    :meth:`vllm_sparse.policies.base.DecodePolicy.score`.

    Reads ``4 * head_dim`` bytes (16-bit cache) per page and KV head.
    """
    num_reqs, q_heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    group = q_heads // kv_heads
    assert q.stride(2) == kv.stride(3) == 1
    assert kv.shape[2] > page_size, "the pages of this cache hold no summary"
    block_c = triton.next_power_of_2(2 * head_dim)
    block_p = min(CHUNK_PAGES, TILE_BYTES // (block_c * kv.element_size()))
    splits = page_splits(num_reqs * kv_heads, block_table.shape[1], CHUNK_PAGES, q.device, TUNING["waves"])
    _quest_score[(splits, kv_heads, num_reqs)](
        q, kv, block_table, plan.table_seq_lens, plan.score_offsets, scores.values, scores.chunk_lse,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), block_table.stride(0),
        scores.values.stride(0), scores.chunk_lse.stride(0), scale, slack,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_C=block_c,
        PAGE=page_size, BLOCK_P=block_p, CHUNK=CHUNK_PAGES, PRECISION="ieee",
        num_warps=TUNING["num_warps"], num_stages=TUNING["num_stages"],
    )  # fmt: skip

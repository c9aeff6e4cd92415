"""quest_score: upper bounds of attention logits from per-page key ranges.

    score[h, p] = scale * sum_d max(q[h, d] * min[p, d], q[h, d] * max[p, d])
                = scale * (relu(q[h]) . max[p] - relu(-q[h]) . min[p])

The second form is one matrix product with the summary row ``[min | max]``, exact in the cache's
dtype. Quest: arXiv 2406.10774.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.kernels.launch import page_splits


@triton.jit
def _quest_score(
    q, kv, block_table, seq_lens, score_offsets, scores,
    q_stride_r, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_r, table_stride, score_stride, scale,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(score_offsets + request)
    seq_len = tl.load(seq_lens + request)
    if (offset < 0) | (seq_len == 0):
        return
    num_pages = (seq_len + PAGE - 1) // PAGE
    if split * BLOCK_P >= num_pages:
        return
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, BLOCK_D)
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = head * GROUP + group
    query = tl.load(q + request.to(tl.int64) * q_stride_r + heads[:, None] * q_stride_h + dims[None, :],
                    mask=q_mask, other=0.0)  # fmt: skip
    zero = tl.zeros_like(query)
    positive = tl.where(query > 0, query, zero)
    negative = tl.where(query < 0, query, zero)
    in_head = (dims < HEAD_DIM)[:, None]
    summaries = kv + head.to(tl.int64) * kv_stride_h + PAGE * kv_stride_r + dims[:, None]
    for start in range(split * BLOCK_P, num_pages, tl.num_programs(0) * BLOCK_P):
        pages = start + tl.arange(0, BLOCK_P)
        live = pages < num_pages
        blocks = tl.load(block_table + request * table_stride + pages, mask=live, other=0).to(tl.int64)
        cells = summaries + blocks[None, :] * kv_stride_b
        mask = live[None, :] & in_head
        low = tl.load(cells, mask=mask, other=0.0)
        high = tl.load(cells + HEAD_DIM, mask=mask, other=0.0)
        bound = tl.dot(positive, high, input_precision=PRECISION)
        bound = tl.dot(negative, low, bound, input_precision=PRECISION) * scale
        target = scores + heads[:, None].to(tl.int64) * score_stride + offset + pages[None, :]
        tl.store(target, bound, mask=(group < GROUP)[:, None] & live[None, :])


def quest_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    page_size: int,
    scale: float,
    scores: torch.Tensor,
) -> None:
    """Score pages by Quest's bound; arguments as in :meth:`vllm_sparse.policies.base.DecodePolicy.score`.

    Reads ``4 * head_dim`` bytes (16-bit cache) per page and KV head.
    """
    num_reqs, q_heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    group = q_heads // kv_heads
    assert q.stride(2) == kv.stride(3) == 1 and scores.dtype == torch.float32 and scores.stride(1) == 1
    assert kv.shape[2] > page_size, "the pages of this cache hold no summary"
    block_p = 64 if head_dim <= 128 else 32
    splits = page_splits(num_reqs * kv_heads, block_table.shape[1], block_p, q.device)
    _quest_score[(splits, kv_heads, num_reqs)](
        q, kv, block_table, plan.table_seq_lens, plan.score_offsets, scores,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), block_table.stride(0),
        scores.stride(0), scale,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        PAGE=page_size, BLOCK_P=block_p, PRECISION="ieee", num_warps=4,
    )  # fmt: skip

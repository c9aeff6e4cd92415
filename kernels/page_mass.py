"""page_mass: the exact attention mass of every page.

    score[h, p] = log sum_{t in p} exp(scale * q[h] . K[t])

Reads every key of the context: the oracle that selectors are measured against.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK, PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, stored
from vllm_sparse.kernels.launch import page_splits
from vllm_sparse.kernels.logits import capped
from vllm_sparse.kernels.query_tokens import mean_query
from vllm_sparse.kernels.store_scores import store_chunk, store_scores
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores


@triton.jit
def _page_mass(
    q_ptr, starts_ptr, kv_ptr, block_table_ptr, seq_lens_ptr, score_offsets_ptr, values_ptr, chunk_lse_ptr,
    q_stride_token, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_slot, table_stride, score_stride,
    chunk_stride, scale, soft_cap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(score_offsets_ptr + request)
    seq_len = tl.load(seq_lens_ptr + request)
    if (offset < 0) | (seq_len == 0):
        return
    num_pages = (seq_len + PAGE - 1) // PAGE
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, PAGE)
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = head * GROUP + group
    cells = q_ptr + heads[:, None] * q_stride_h + dims[None, :]
    query, _ = mean_query(cells, starts_ptr, request, q_stride_token, q_mask)
    query = query.to(q_ptr.dtype.element_ty)
    keys = kv_ptr + head.to(tl.int64) * kv_stride_h + rows[None, :] * kv_stride_slot + dims[:, None]
    one = tl.arange(0, 1)
    for chunk in range(split, (num_pages + CHUNK - 1) // CHUNK, tl.num_programs(0)):
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        for page in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, num_pages)):
            block = tl.load(block_table_ptr + request * table_stride + page).to(tl.int64)
            live = page * PAGE + rows < seq_len
            k = tl.load(keys + block * kv_stride_b, mask=live[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
            logits = tl.dot(query, stored(k, query.dtype), input_precision=PRECISION) * scale
            if CAPPED:
                logits = capped(logits, soft_cap)
            logits = tl.where(live[None, :], logits, float("-inf"))
            peak = tl.max(logits, axis=1)
            mass = tl.log(tl.sum(tl.exp(logits - peak[:, None]), axis=1)) + peak
            top, total = store_scores(values_ptr, mass[:, None], heads, group < GROUP, offset, page + one,
                                      one == 0,
                                      score_stride, top, total)  # fmt: skip
        store_chunk(chunk_lse_ptr, heads, group < GROUP, offset, request, chunk, chunk_stride, top, total)


def page_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
) -> None:
    """Exact page masses; arguments as in :meth:`vllm_sparse.policies.base.DecodePolicy.score`."""
    page_size, scale = geometry.page_size, geometry.scale
    (q_heads, head_dim), num_reqs = q.shape[1:], len(block_table)
    kv_heads = kv.shape[1]
    group = q_heads // kv_heads
    assert q.stride(2) == kv.stride(3) == 1
    splits = page_splits(num_reqs * kv_heads, block_table.shape[1], CHUNK_PAGES, q.device)
    _page_mass[(splits, kv_heads, num_reqs)](
        q, plan.queries.starts, elements_of(kv), block_table, plan.table_seq_lens, plan.score_offsets,
        scores.values, scores.chunk_lse, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2),
        block_table.stride(0), scores.values.stride(0), scores.chunk_lse.stride(0), scale,
        geometry.soft_cap,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size,
        CAPPED=geometry.soft_cap > 0,
    )  # fmt: skip

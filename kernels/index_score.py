"""Scores that need no keys: recency, and a hash for the random baseline.

recency[h, p] = p
random[h, p]  = murmur3 finaliser of (seq_len, h, p), uniform in [0, 1)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK
from vllm_sparse.kernels.hash_uniform import hash_uniform
from vllm_sparse.kernels.launch import page_splits
from vllm_sparse.kernels.store_scores import store_chunk, store_scores
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores


@triton.jit
def _index_score(
    seq_lens_ptr, score_offsets_ptr, values_ptr, chunk_lse_ptr, score_stride, chunk_stride,
    PAGE: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(score_offsets_ptr + request)
    seq_len = tl.load(seq_lens_ptr + request)
    if (offset < 0) | (seq_len == 0):
        return
    num_pages = (seq_len + PAGE - 1) // PAGE
    one = tl.arange(0, 1)
    for chunk in range(split, (num_pages + CHUNK - 1) // CHUNK, tl.num_programs(0)):
        pages = chunk * CHUNK + tl.arange(0, CHUNK)
        score = hash_uniform(seq_len, head, pages) if RANDOM else pages.to(tl.float32)
        top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
        top, total = store_scores(values_ptr, score[None, :], head + one, one == 0, offset, pages,
                                  pages < num_pages,
                                  score_stride, top, total)  # fmt: skip
        store_chunk(chunk_lse_ptr, head + one, one == 0, offset, request, chunk, chunk_stride, top, total)


def _launch(block_table, plan, page_size, scores, random):
    q_heads, num_reqs = scores.q_heads, plan.table_seq_lens.shape[0]
    splits = page_splits(num_reqs * q_heads, block_table.shape[1], CHUNK_PAGES, block_table.device)
    _index_score[(splits, q_heads, num_reqs)](
        plan.table_seq_lens, plan.score_offsets, scores.values, scores.chunk_lse,
        scores.values.stride(0), scores.chunk_lse.stride(0),
        PAGE=page_size, RANDOM=random, num_warps=1,
    )  # fmt: skip


def recency_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    """Later pages score higher; arguments as in :meth:`vllm_sparse.policies.base.DecodePolicy.score`."""
    _launch(block_table, plan, page_size, scores, random=False)


def random_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    """Hashed scores; arguments as in :meth:`vllm_sparse.policies.base.DecodePolicy.score`."""
    _launch(block_table, plan, page_size, scores, random=True)

"""How score kernels write PageScores: values, and the log-sum-exp of each chunk of pages."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse.kernels.constants import CHUNK


@triton.jit
def store_scores(values_ptr, block, heads, member, offset, pages, live, score_stride, top, total):
    """Store ``block`` [group, pages] and carry the chunk's running maximum and sum, each [group]."""
    target = values_ptr + heads[:, None].to(tl.int64) * score_stride + offset + pages[None, :]
    tl.store(target, block, mask=member[:, None] & live[None, :])
    block = tl.where(live[None, :], block, float("-inf"))
    new_top = tl.maximum(top, tl.max(block, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp(top - base) + tl.sum(tl.exp(block - base[:, None]), axis=1)
    return new_top, total


@triton.jit
def store_chunk(chunk_lse_ptr, heads, member, offset, request, chunk, chunk_stride, top, total):
    """Store the log-sum-exp of a chunk from its maximum and sum, each [group]."""
    target = chunk_lse_ptr + heads.to(tl.int64) * chunk_stride + offset // CHUNK + request + chunk
    tl.store(target, top + tl.log(total), mask=member)

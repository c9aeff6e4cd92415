"""code_queries: queries in e4m3, for attention that multiplies codes: ``out[t, h] = e4m3(q[t, h] / scale)``.

Rounded to the nearest and saturated, as vLLM's own quantisation of queries is. Source and target may lie in any
order: FlashAttention-3 wants query blocks by head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.e4m3 import elements_of, saturated_e4m3


@triton.jit
def _code_queries(
    q_ptr, out_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h, scale,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.arange(0, HEADS_PAD)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (dims < HEAD_DIM)
    query = tl.load(q_ptr + token * q_stride_t + heads * q_stride_h + dims, mask=mask, other=0.0).to(tl.float32)
    target = out_ptr + token * out_stride_t + heads * out_stride_h + dims
    tl.store(target, saturated_e4m3(query / scale, out_ptr.dtype.element_ty), mask=mask)


def code_queries(q: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Write codes of queries.

    Args:
        q: [num_tokens, q_heads, head_dim], last dimension contiguous.
        scale: what queries are divided by.
        out: [num_tokens, q_heads, head_dim] of ``torch.float8_e4m3fn``, last dimension contiguous.
    """
    num_tokens, q_heads, head_dim = q.shape
    assert q.stride(2) == out.stride(2) == 1 and out.shape == q.shape and out.dtype is torch.float8_e4m3fn
    if num_tokens == 0:
        return
    _code_queries[(num_tokens,)](
        q, elements_of(out), q.stride(0), q.stride(1), out.stride(0), out.stride(1), scale,
        HEADS=q_heads, HEADS_PAD=triton.next_power_of_2(q_heads), HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip

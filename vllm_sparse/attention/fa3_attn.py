"""FlashAttention-3 as a page-sparse attention kernel, unmodified.

It allocates for itself in each call: scheduling data (8 bytes a row), log-sums (4 bytes a query and head), and
where it splits rows float32 outputs of every part, for which it assumes that one row is long and all others are
short: it asks for enough parts of each to fill the GPU with one. :func:`most_splits` bounds them by their memory.

Over a cache of e4m3 it wants queries in e4m3, too, as vLLM's own backend gives it them, and answers in bfloat16.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_sparse import kernels
from vllm_sparse.attention.base import AttentionKernel, AttentionShape
from vllm_sparse.pages.layout import single_head_pages
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS

E4M3 = torch.float8_e4m3fn
MAX_ROWS = 1 << 17
PARTS_BYTES = 32 << 20
"""Most that the parts of split rows take. At head_dim 128 it is two parts of each of up to 254 blocks of queries;
more blocks fill a GPU unsplit."""
TILE_TOKENS, UNSPLIT_TILES = 128, 4
"""Keys that FlashAttention takes at a time, and what it never splits by its own choice."""
MOST_SPLITS = 128
"""The most parts that FlashAttention chooses."""


def most_splits(queries: int, head_dim: int, row_tokens: int) -> int:
    """Most parts that a row may be split into; the device takes fewer by the lengths of all rows.

    Args:
        queries: of all rows, over all their query heads.
        row_tokens: most keys of a row.
    """
    tiles = -(-row_tokens // TILE_TOKENS)
    if tiles <= UNSPLIT_TILES:
        return 1
    return max(1, min(MOST_SPLITS, tiles, PARTS_BYTES // (4 * queries * (head_dim + 1))))


class FA3Attention(AttentionKernel):
    """Every (request, KV head) is a sequence over single-head pages; its group are the query heads.

    Shah et al., "FlashAttention-3", arXiv 2407.08608, in the build that vLLM ships.
    """

    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        if shape.device.type != "cuda":
            return f"needs a GPU, and this is {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"computes float16 and bfloat16, not {shape.dtype}"
        if shape.geometry.head_dim % 8 or shape.geometry.head_dim > 256:
            return f"head_dim {shape.geometry.head_dim} is not a multiple of 8 up to 256"
        if not shape.geometry.plain:
            return "is not called with soft caps or sink logits here"
        try:
            from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason
        except ImportError as error:
            return f"this vLLM has no FlashAttention ({error})"
        return fa_version_unsupported_reason(3)

    def __init__(self) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func
        # Made here and not on first use, which may be inside a CUDA graph's capture.
        self._starts = _sequence_starts(torch.cuda.current_device())

    def attend(self, q, kv, table, geometry, out, host=None, exponents=None):
        assert host is None, "this kernel attends to pages on the GPU only"
        num_reqs, q_heads, head_dim = q.shape
        kv_heads = kv.shape[1]
        rows, group = num_reqs * kv_heads, q_heads // kv_heads
        assert rows <= MAX_ROWS, f"{rows} rows of (request, KV head) in a step; at most {MAX_ROWS}"
        keys, values = single_head_pages(kv, geometry.page_size)
        row_tokens = table.head_pages.shape[1] * geometry.page_size
        if kv.dtype is E4M3:
            codes = torch.empty_like(q, dtype=E4M3, memory_format=torch.contiguous_format)
            kernels.for_device(q.device).code_queries(q, geometry.q_scale, codes)
            q = codes
        result = self._attend(
            q=q.reshape(rows, group, head_dim),
            k=keys,
            v=values,
            cu_seqlens_q=self._starts[: rows + 1],
            max_seqlen_q=1,
            seqused_k=table.lengths,
            max_seqlen_k=row_tokens,
            block_table=table.head_pages,
            softmax_scale=geometry.scale * geometry.q_scale,
            causal=True,
            num_splits=most_splits(num_reqs * q_heads, head_dim, row_tokens),
            fa_version=3,
        )
        if kv.dtype is E4M3:
            result = result.mul_(geometry.v_scale).to(out.dtype)
        # It writes zeros for empty sequences, and those rows of ``out`` belong to the dense backend.
        attended = (table.lengths > 0).view(num_reqs, kv_heads, 1, 1)
        heads = (num_reqs, kv_heads, group, head_dim)
        torch.where(attended, result.view(heads), out.view(heads), out=out.view(heads))

    def attend_blocks(self, q, kv, table, geometry, out, scratch):
        """Every (query head, block) is a sequence; queries by head lie as sequences must."""
        num_tokens, q_heads, head_dim = q.shape
        keys, values = single_head_pages(kv, geometry.page_size)
        by_head, result = scratch[:, : q.numel()].view(2, q_heads, num_tokens, head_dim)
        if kv.dtype is E4M3:
            by_head, result = scratch[0].view(E4M3)[: q.numel()].view(by_head.shape), result.view(torch.bfloat16)
            kernels.for_device(q.device).code_queries(q, geometry.q_scale, by_head.transpose(0, 1))
        else:
            by_head.copy_(q.transpose(0, 1))
        row_tokens = table.head_pages.shape[1] * geometry.page_size
        self._attend(
            q=by_head.view(-1, 1, head_dim),
            k=keys,
            v=values,
            out=result.view(-1, 1, head_dim),
            cu_seqlens_q=table.starts,
            max_seqlen_q=min(num_tokens, BLOCK_TOKENS),
            seqused_k=table.lengths,
            max_seqlen_k=row_tokens,
            block_table=table.head_pages,
            softmax_scale=geometry.scale * geometry.q_scale,
            causal=True,
            num_splits=most_splits(num_tokens * q_heads, head_dim, row_tokens),
            fa_version=3,
        )
        if kv.dtype is E4M3:
            torch.mul(result.transpose(0, 1), geometry.v_scale, out=out)
        else:
            out.copy_(result.transpose(0, 1))


@cache
def _sequence_starts(device_index: int) -> torch.Tensor:
    """int32 [MAX_ROWS + 1]: every sequence has one row of queries."""
    return torch.arange(MAX_ROWS + 1, dtype=torch.int32, device=f"cuda:{device_index}")

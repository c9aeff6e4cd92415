"""FlashAttention-3 as a page-sparse engine, unmodified."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from vllm_sparse.engines.base import AttentionShape, Engine
from vllm_sparse.page_table import single_head_pages
from vllm_sparse.query_blocks import BLOCK_TOKENS

MAX_ROWS = 1 << 17


class FA3Engine(Engine):
    """Every (request, KV head) is a sequence over single-head pages; its group are the query heads.

    Shah et al., "FlashAttention-3", arXiv 2407.08608, in the build that vLLM ships.
    """

    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        if shape.device.type != "cuda":
            return f"needs a GPU, and this is {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"computes float16 and bfloat16, not {shape.dtype}"
        if shape.head_dim % 8 or shape.head_dim > 256:
            return f"head_dim {shape.head_dim} is not a multiple of 8 up to 256"
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

    def attend(self, q, kv, table, page_size, scale, out, host=None):
        assert host is None, "this engine attends to pages on the GPU only"
        num_reqs, q_heads, head_dim = q.shape
        kv_heads = kv.shape[1]
        rows, group = num_reqs * kv_heads, q_heads // kv_heads
        assert rows <= MAX_ROWS, f"{rows} rows of (request, KV head) in a step; at most {MAX_ROWS}"
        keys, values = single_head_pages(kv, page_size)
        result = self._attend(
            q=q.reshape(rows, group, head_dim),
            k=keys,
            v=values,
            cu_seqlens_q=self._starts[: rows + 1],
            max_seqlen_q=1,
            seqused_k=table.lengths,
            max_seqlen_k=table.units.shape[1] * page_size,
            block_table=table.units,
            softmax_scale=scale,
            causal=True,
            fa_version=3,
        )
        # It writes zeros for empty sequences, and those rows of ``out`` belong to the dense backend.
        attended = (table.lengths > 0).view(num_reqs, kv_heads, 1, 1)
        heads = (num_reqs, kv_heads, group, head_dim)
        torch.where(attended, result.view(heads), out.view(heads), out=out.view(heads))

    def attend_blocks(self, q, kv, table, page_size, scale, out, scratch):
        """Every (query head, block) is a sequence; queries by head lie as sequences must."""
        num_tokens, q_heads, head_dim = q.shape
        keys, values = single_head_pages(kv, page_size)
        by_head, result = scratch[:, : q.numel()].view(2, q_heads, num_tokens, head_dim)
        by_head.copy_(q.transpose(0, 1))
        self._attend(
            q=by_head.view(-1, 1, head_dim),
            k=keys,
            v=values,
            out=result.view(-1, 1, head_dim),
            cu_seqlens_q=_block_starts(num_tokens, q_heads, q.device.index),
            max_seqlen_q=min(num_tokens, BLOCK_TOKENS),
            seqused_k=table.lengths,
            max_seqlen_k=table.units.shape[1] * page_size,
            block_table=table.units,
            softmax_scale=scale,
            causal=True,
            fa_version=3,
        )
        out.copy_(result.transpose(0, 1))


@lru_cache(maxsize=64)
def _block_starts(num_tokens: int, q_heads: int, device_index: int) -> torch.Tensor:
    """int32 [q_heads * num_blocks + 1]: sequences are the blocks of each head's tokens in turn."""
    blocks = torch.arange(0, num_tokens, BLOCK_TOKENS, dtype=torch.int32)
    starts = torch.arange(q_heads, dtype=torch.int32)[:, None] * num_tokens + blocks
    starts = torch.cat([starts.flatten(), torch.tensor([q_heads * num_tokens], dtype=torch.int32)])
    return starts.to(f"cuda:{device_index}")


@cache
def _sequence_starts(device_index: int) -> torch.Tensor:
    """int32 [MAX_ROWS + 1]: every sequence has one row of queries."""
    return torch.arange(MAX_ROWS + 1, dtype=torch.int32, device=f"cuda:{device_index}")

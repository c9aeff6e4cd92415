"""FlashAttention-3 as a page-sparse engine, unmodified."""

from __future__ import annotations

import torch

from vllm_sparse.engines.base import AttentionShape, Engine
from vllm_sparse.page_table import single_head_pages


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
        self._starts: dict[torch.device, torch.Tensor] = {}

    def _sequence_starts(self, rows: int, device: torch.device) -> torch.Tensor:
        """int32 [rows + 1]: one query row per sequence. Grown, never freed: CUDA graphs hold it."""
        starts = self._starts.get(device)
        if starts is None or len(starts) <= rows:
            size = max(rows + 1, 2 * len(starts) if starts is not None else 1024)
            starts = self._starts[device] = torch.arange(size, dtype=torch.int32, device=device)
            self._starts.setdefault(("kept", size), starts)  # type: ignore[arg-type]
        return starts[: rows + 1]

    def attend(self, q, kv, table, page_size, scale, out):
        num_reqs, q_heads, head_dim = q.shape
        kv_heads = kv.shape[1]
        rows, group = num_reqs * kv_heads, q_heads // kv_heads
        keys, values = single_head_pages(kv, page_size)
        result = self._attend(
            q=q.reshape(rows, group, head_dim),
            k=keys,
            v=values,
            cu_seqlens_q=self._sequence_starts(rows, q.device),
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

"""SparseBackend: what vLLM asks of an attention backend before it builds one."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from vllm_sparse.backend import compat
from vllm_sparse.cache.spec import SparseAttentionSpec
from vllm_sparse.config import PAGE_SIZES
from vllm_sparse.summaries import summary_rows

compat.install_spec_hook()
compat.install_worker_method()
compat.install_memory_hooks()


class SparseBackend(AttentionBackend):
    """Page-sparse attention for full-attention decoder layers (``--attention-backend sparse``)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32"]
    forward_includes_kv_cache_update = False

    summary: ClassVar[str] = "none"
    item_bytes: ClassVar[int] = 2
    on_host: ClassVar[bool] = False
    """Of the engine being built, as vLLM asks for shapes without its config at hand: what pages store beside K
    and V, bytes of a number, and whether K and V are in CPU memory, so that vLLM's blocks hold summaries alone."""

    @staticmethod
    def get_name() -> str:
        return compat.NAME

    @staticmethod
    def get_impl_cls():
        from vllm_sparse.backend.impl import SparseImpl

        return SparseImpl

    @staticmethod
    def get_builder_cls():
        from vllm_sparse.backend.builder import SparseMetadataBuilder

        return SparseMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(PAGE_SIZES[0])]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 256 and head_size % 16 == 0

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    # The cache: pages of block_size rows [K | V] per KV head, then the summary rows.

    @classmethod
    def customize_spec(cls, spec):
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        if type(spec) is not FullAttentionSpec:
            return spec
        return SparseAttentionSpec.extend(spec, cls.summary, cls.on_host)

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        on_host = SparseBackend.on_host
        rows = summary_rows(
            SparseBackend.summary, block_size, head_size, SparseBackend.item_bytes, least=int(on_host)
        )
        return (num_blocks, num_kv_heads, rows if on_host else block_size + rows, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False):
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def get_required_kv_cache_layout(cls):
        return "HND"

    @classmethod
    def supported_kv_cache_layouts(cls):
        return compat.head_major_layouts()

"""SparseBackend: what vLLM asks of an attention backend before it builds one."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from vllm_sparse.backend import compat
from vllm_sparse.backend.spec import SparseAttentionSpec, page_size_of
from vllm_sparse.pages.layout import PAGE_SIZES


class SparseBackend(AttentionBackend):
    """Page-sparse attention for the layers that :mod:`vllm_sparse.support` names (``--attention-backend sparse``).

    Layers of an engine get a class of their own, :meth:`storing`, since vLLM asks for the layout of pages without
    its config at hand.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32"]
    forward_includes_kv_cache_update = False

    summary: ClassVar[str] = "none"
    """What pages store beside K and V: one of :data:`vllm_sparse.pages.summaries.SUMMARIES`."""
    on_host: ClassVar[bool] = False
    """Whether K and V are in CPU memory, so that vLLM's blocks hold summaries alone."""

    @classmethod
    @cache
    def storing(cls, summary: str, on_host: bool) -> type[SparseBackend]:
        """The backend of layers whose pages store ``summary``."""
        return type(f"SparseBackend_{summary}", (cls,), {"summary": summary, "on_host": on_host})

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
        if isinstance(kv_cache_spec, SparseAttentionSpec):
            return [kv_cache_spec.page_size]  # larger blocks are split into pages
        return [MultipleOf(PAGE_SIZES[0])]

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # which rows of a step decode is read off the CPU's lengths

    # The cache: pages of page_size rows [K | V] per KV head, then the summary slots.

    @classmethod
    def customize_spec(cls, spec):
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"sparse attention cannot store the cache of a layer that asks for a {type(spec).__name__}; use "
                f"another --attention-backend for this model"
            )
        config = get_current_vllm_config_or_none()
        of_config = None if config is None else config.cache_config.block_size
        return SparseAttentionSpec.extend(spec, page_size_of(spec.block_size, of_config), cls.summary, cls.on_host)

    @classmethod
    def supported_kv_cache_layouts(cls):
        return compat.head_major_layouts()

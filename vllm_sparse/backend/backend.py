"""SparseBackend: what vLLM asks of an attention backend before it builds one."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from vllm_sparse.backend import compat
from vllm_sparse.backend.spec import PageLayout, SparseAttentionSpec, page_size_of
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.support import QUANTISED_CACHES


class SparseBackend(AttentionBackend):
    """Page-sparse attention for the layers that :mod:`vllm_sparse.support` names (``--attention-backend sparse``).

    vLLM asks a layer's backend for the layout of pages, without the layer or its config at hand, so layers get a
    class for their layout (:meth:`of`). The layout itself is one frozen object, and nothing else is kept here.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32", *QUANTISED_CACHES]
    forward_includes_kv_cache_update = False

    layout: ClassVar[PageLayout] = PageLayout()

    @classmethod
    @cache
    def of(cls, layout: PageLayout) -> type[SparseBackend]:
        """The backend of layers whose pages have ``layout``: the same class for equal layouts."""
        where, pages = "host" if layout.on_host else "gpu", f"_{layout.page_size}" if layout.page_size else ""
        pages += f"_{layout.least_slots}" if layout.least_slots else ""
        return type(f"SparseBackend_{layout.summary}_{where}{pages}", (cls,), {"layout": layout})

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
        page_size = cls.layout.page_size
        if page_size is None:
            config = get_current_vllm_config_or_none()
            page_size = page_size_of(spec.block_size, None if config is None else config.cache_config.block_size)
        return SparseAttentionSpec.extend(spec, page_size, cls.layout)

    @classmethod
    def supported_kv_cache_layouts(cls):
        return compat.head_major_layouts()

"""The KV-cache spec that makes vLLM plan, allocate and share pages with their summaries.

A page holds ``block_size`` rows of ``[K | V]`` per KV head and then ``summary_rows`` rows of the
same width. vLLM's memory planning counts them, and prefix caching, copy-on-write, preemption and
KV connectors carry them, because they are bytes of the page like any others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse import summaries
from vllm_sparse.backend import compat, connectors


@dataclass(frozen=True, kw_only=True)
class SparseAttentionSpec(FullAttentionSpec):
    """Full attention whose pages end in ``summary_rows`` extra rows per KV head."""

    summary: str = "none"
    """One of :data:`vllm_sparse.summaries.SUMMARIES`."""
    on_host: bool = False
    """Offload: K and V are in CPU memory, and a block of vLLM's holds the summary rows alone."""

    @property
    def summary_rows(self) -> int:
        return summaries.summary_rows(
            self.summary, self.block_size, self.head_size, self.dtype.itemsize, least=int(self.on_host)
        )

    @property
    def real_page_size_bytes(self) -> int:
        content_bytes = super().real_page_size_bytes
        if compat.pages_count_rows():
            return content_bytes
        rows = self.summary_rows if self.on_host else self.block_size + self.summary_rows
        return content_bytes // self.block_size * rows

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        if self.on_host:
            return self.summary_rows
        return super().get_num_kernel_states(kernel_block_size) + self.summary_rows

    @classmethod
    def merge(cls, specs):
        """One spec for a group of layers, all of which must be equal."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError("layers of one KV cache group must have the same sparse page layout")
        return specs[0]

    @classmethod
    def extend(cls, spec: FullAttentionSpec, summary: str, on_host: bool = False) -> SparseAttentionSpec:
        """``spec`` with the rows of a summary added, or with nothing but them."""
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"sparse attention needs equal K and V head sizes, not {spec.head_size} and {spec.head_size_v}; "
                f"use another --attention-backend for this model"
            )
        values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        return cls(**values, summary=summary, on_host=on_host)


class SparseAttentionManager(FullAttentionManager):
    """Block manager of sparse pages.

    Blocks, prefix hits and preemption are those of full attention, since a summary is a function of
    its page's keys and lives in the page. With offload a block names a page of the host pool as well, so
    they span host memory.
    """


# Registering first would make vLLM believe that its own specs are registered already.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(SparseAttentionSpec, SparseAttentionManager, uniform_type_base_spec=FullAttentionSpec)

# Whatever process manages blocks of such pages has loaded this module before its first request.
connectors.install_request_hook()

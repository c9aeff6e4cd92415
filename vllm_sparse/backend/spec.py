"""The KV-cache spec that makes vLLM plan, allocate and share pages with their summaries.

A page holds ``page_size`` token slots of ``[K | V]`` per KV head and then ``summary_slots`` slots as wide. vLLM's
memory planning counts them, and prefix caching, copy-on-write, preemption and KV connectors that copy whole blocks
carry them, because they are bytes of the page like any others. A block of vLLM's holds one page; where vLLM makes
blocks larger, to bring layers to one size, it splits them into pages again for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.pages import summaries
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.support import QUANTISED_CACHES, Decision

MOST_SLOTS = 4
"""Slots of a page for the sake of small blocks: with offload the GPU then has a quarter of K and V's bytes."""


@dataclass(frozen=True)
class PageLayout:
    """What a page of a layer holds in vLLM's memory.

    Made once, when the layer is; its backend, its spec and its implementation carry the same object, so engines of
    other settings in one process have other layouts and nothing to share.
    """

    summary: str = "none"
    """What a page stores beside K and V: one of :data:`vllm_sparse.pages.summaries.SUMMARIES`."""
    on_host: bool = False
    """Offload: K and V are in CPU memory, and a block of vLLM's holds the summary slots alone."""
    page_size: int | None = None
    """Tokens of a page where a block holds several; None: a block is a page."""
    least_slots: int = 0
    """Slots that a page has at least with offload: the more, the smaller a block that has room for a state."""

    @classmethod
    def of(cls, config: SparseConfig, decision: Decision, linear: bool, least_slots: int = 0) -> PageLayout:
        """The layout of a layer's pages; where no layer chooses any they need no summary.

        Beside ``linear`` layers vLLM makes blocks as large as a state of theirs, of any multiple of 16 tokens:
        these hold pages of the least size, which ranks best.
        """
        summary = "none" if decision.all_dense else DECODE_POLICIES[config.decode_policy].summary
        return cls(summary, config.offload is not None, PAGE_SIZES[0] if linear else None, least_slots)

    def summary_slots(self, page_size: int, head_dim: int, item_bytes: int) -> int:
        """Summary slots of a page; at least one with offload, where vLLM's blocks hold nothing else."""
        return summaries.summary_slots(self.summary, page_size, head_dim, item_bytes, least=int(self.on_host))

    def page_slots(self, page_size: int, head_dim: int, item_bytes: int) -> int:
        """Slots of a page in vLLM's memory."""
        slots = self.summary_slots(page_size, head_dim, item_bytes)
        return max(slots, self.least_slots) if self.on_host else slots + page_size


def slots_of_asked_blocks(vllm_config: Any, kv_heads: int, head_dim: int) -> int:
    """Slots of a page by which blocks of ``--block-size`` have room for a state; 0 where that asks for no size.

    Only with offload, where vLLM's blocks would be of thousands of tokens, and a state leaves as much of the host
    idle.
    """
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size or cache.block_size <= PAGE_SIZES[0]:
        return 0
    quantised = compat.kv_dtype(vllm_config) in QUANTISED_CACHES
    item_bytes = 1 if quantised else vllm_config.model_config.dtype.itemsize
    pages = cache.block_size // PAGE_SIZES[0]
    slots = -(-compat.state_bytes(vllm_config) // (pages * kv_heads * 2 * head_dim * item_bytes))
    return slots if slots <= MOST_SLOTS else 0


@dataclass(frozen=True, kw_only=True)
class SparseAttentionSpec(FullAttentionSpec):
    """Full attention whose pages end in ``summary_slots`` extra slots per KV head.

    vLLM manages its blocks as those of its base class: prefix hits and preemption are those of full attention,
    since a summary is a function of its page's keys and lives in the page. With offload a block names a page of
    the host pool as well, so they span host memory.
    """

    page_size: int
    """Tokens of a page; a block holds a whole number of pages, or is one token, by which vLLM sizes others."""
    layout: PageLayout = PageLayout()

    @property
    def summary_slots(self) -> int:
        """Summary slots of a page."""
        return self.layout.summary_slots(self.page_size, self.head_size, self.dtype.itemsize)

    @property
    def page_slots(self) -> int:
        """Slots of a page in vLLM's memory."""
        return self.layout.page_slots(self.page_size, self.head_size, self.dtype.itemsize)

    @property
    def unpadded_page_size_bytes(self) -> int:
        """Bytes of a block: proportional to its tokens, so exact for one token too."""
        token_bytes = self.num_heads * self.state_content_size_bytes
        return self.block_size * self.page_slots * token_bytes // self.page_size

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return kernel_block_size * self.page_slots // self.page_size

    @classmethod
    def merge(cls, specs):
        """One spec for a group of layers, all of which must be equal.

        Raises:
            AssertionError: they are not, which is how vLLM asks whether they are.
        """
        assert all(spec == specs[0] for spec in specs), "layers of one group must have the same sparse pages"
        return specs[0]

    @classmethod
    def extend(cls, spec: FullAttentionSpec, page_size: int, layout: PageLayout) -> SparseAttentionSpec:
        """``spec`` with the slots of a summary added to each page, or with nothing but them."""
        values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        return cls(**values, page_size=page_size, layout=layout)


def page_size_of(block_size: int, config_block_size: int | None) -> int:
    """Tokens of a page in blocks of ``block_size``: the block, unless vLLM asks for a block that holds no page.

    It does to learn the bytes of one token; its own config then knows the size of real ones.
    """
    if block_size in PAGE_SIZES:
        return block_size
    return config_block_size if config_block_size in PAGE_SIZES else PAGE_SIZES[0]

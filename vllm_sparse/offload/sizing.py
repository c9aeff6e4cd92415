"""How host and GPU memory are shared out in offload mode: plain arithmetic, for the engine and for the planner."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.hot_set import WAYS

GIB = 1 << 30
LEAST_HOT_SHARE = 0.25
"""Share of the GPU's KV memory that the hot set has at least, with ``hot_fraction: auto``."""
SLOT_STATE_BYTES = 8
"""GPU bytes beside each hot slot: the head page it holds and when it was last used."""
MAP_BYTES = 4
"""GPU bytes for each head page of the pool: the hot slot that holds it."""
EXPONENT_BYTES = 2
"""GPU bytes for each head page of a 16-bit cache whose pool is in fp8: the exponents of its K and its V."""


@dataclass(frozen=True)
class States:
    """What layers of states take of vLLM's blocks, which they share with those that offload.

    A block holds K and V of tokens, whose summaries are on the GPU, or states of one request, whose share of the
    host pool then lies idle.
    """

    block_bytes: int
    """GPU memory of a block."""
    request_blocks: int
    """Most blocks that hold states of a request."""


@dataclass(frozen=True)
class CacheShape:
    """The KV cache of one rank."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    item_bytes: int
    summary_slots: int
    host_dtype: str = "auto"
    """See :class:`vllm_sparse.offload.config.OffloadConfig`."""
    block_pages: int = 1
    """Pages of one of vLLM's blocks: several beside layers of states, whose size vLLM fits its blocks to."""
    states: States | None = None
    """Of those layers."""

    @property
    def token_bytes(self) -> int:
        """K and V of one token and KV head."""
        return 2 * self.head_dim * self.item_bytes

    @property
    def head_page_bytes(self) -> int:
        """K and V of a page of one KV head, on the GPU."""
        return self.page_size * self.token_bytes

    @property
    def in_fp8(self) -> bool:
        """Whether the host holds e4m3, because it was asked to, or the cache does."""
        return self.host_dtype == "fp8" or self.item_bytes == 1

    @property
    def has_exponents(self) -> bool:
        """Whether head pages are coded on their way to the host; a cache in fp8 is moved as it is."""
        return self.in_fp8 and self.item_bytes > 1

    @property
    def host_head_page_bytes(self) -> int:
        """K and V of a page of one KV head, on the host: what a decode step moves."""
        return self.head_page_bytes // self.item_bytes if self.in_fp8 else self.head_page_bytes

    @property
    def slot_bytes(self) -> int:
        """GPU memory of a slot: a head page, and room for a summary, so that pages are written in slots too."""
        return (self.page_size + self.summary_slots) * self.token_bytes

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    @property
    def block_head_pages(self) -> int:
        """Head pages of a block in all layers."""
        return self.layers * self.block_pages * self.kv_heads

    @property
    def host_block_bytes(self) -> int:
        """Host memory of a block: its K and V in all layers."""
        return self.block_head_pages * self.host_head_page_bytes

    @property
    def gpu_block_bytes(self) -> int:
        """What vLLM allocates for a block on the GPU: its summaries in all layers, or as many states."""
        if self.states is not None:
            return self.states.block_bytes
        return self.block_head_pages * self.summary_slots * self.token_bytes

    @property
    def map_block_bytes(self) -> int:
        """What is known of a block's head pages on the GPU."""
        return self.block_head_pages * (MAP_BYTES + (EXPONENT_BYTES if self.has_exponents else 0))

    def context_blocks(self, tokens: int) -> int:
        """Blocks of a request of ``tokens``: of its K and V, and of its states."""
        return -(-tokens // self.block_tokens) + (self.states.request_blocks if self.states is not None else 0)


@dataclass(frozen=True)
class StepLimits:
    """Sizes of the largest step."""

    max_num_reqs: int
    max_num_tokens: int
    max_context_tokens: int
    table_pages: int
    """Most pages attended per (request, KV head) in a decode step."""

    def staged_pages(self, page_size: int) -> int:
        """Most pages that one step writes to: two per request beside those that it fills."""
        return min(self.max_num_tokens, self.max_num_tokens // page_size + 2 * self.max_num_reqs)

    def context_pages(self, page_size: int) -> int:
        return -(-self.max_context_tokens // page_size) + 1

    def fixed_bytes(self, shape: CacheShape) -> int:
        """GPU memory that does not grow with the pool: pages being written, two contexts of a layer, tables."""
        staged = self.staged_pages(shape.page_size) * shape.kv_heads * shape.slot_bytes
        contexts = 2 * self.context_pages(shape.page_size) * shape.kv_heads * shape.head_page_bytes
        tables = 2 * 4 * self.max_num_reqs * shape.kv_heads * self.table_pages
        return staged + contexts + tables + 8 * self.max_num_tokens + 12 * self.staged_pages(shape.page_size)


@dataclass(frozen=True)
class Split:
    """What a rank's memory holds."""

    num_blocks: int
    """vLLM's blocks, of which one is never used: parts of the host pool, with summaries on the GPU."""
    slots_per_layer: int
    """Head pages that the hot set holds of each layer."""

    def tokens(self, shape: CacheShape, context_tokens: int) -> int:
        """Tokens that requests of ``context_tokens`` hold together."""
        return self.num_blocks * context_tokens // shape.context_blocks(context_tokens)


def slots_beside(
    num_blocks: int, shape: CacheShape, limits: StepLimits, gpu_bytes: int, hot_fraction: float | str
) -> int:
    """Slots per layer in what the summaries of ``num_blocks`` leave of ``gpu_bytes``; a multiple of ``WAYS``."""
    usable = gpu_bytes - limits.fixed_bytes(shape)
    hot_bytes = usable - num_blocks * (shape.gpu_block_bytes + shape.map_block_bytes)
    if hot_fraction != "auto":
        hot_bytes = min(hot_bytes, int(usable * hot_fraction))
    slots = max(0, hot_bytes) // (shape.layers * (shape.slot_bytes + SLOT_STATE_BYTES))
    return min(slots, num_blocks * shape.block_pages * shape.kv_heads + WAYS - 1) // WAYS * WAYS


def split_memory(
    shape: CacheShape, limits: StepLimits, gpu_bytes: int, host_bytes: int, hot_fraction: float | str
) -> Split:
    """Share out ``gpu_bytes`` of the GPU's memory for KV and ``host_bytes`` of the host's, both of one rank.

    Raises:
        ConfigError: they do not hold one context of ``max_context_tokens``; says how much is missing.
    """
    block_bytes = shape.gpu_block_bytes + shape.map_block_bytes
    usable = gpu_bytes - limits.fixed_bytes(shape)
    share = LEAST_HOT_SHARE if hot_fraction == "auto" else hot_fraction
    on_host = host_bytes // shape.host_block_bytes
    on_gpu = max(0, int(usable * (1 - share))) // block_bytes
    num_blocks = min(on_host, on_gpu)
    needed = shape.context_blocks(limits.max_context_tokens) + 1
    if num_blocks < needed:
        fixed, summaries = limits.fixed_bytes(shape), needed * block_bytes
        held = "summaries of its pages" if shape.states is None else "summaries of its pages, and its states"
        raise ConfigError(
            f"sparse.offload: one context of --max-model-len {limits.max_context_tokens} needs "
            f"{needed * shape.host_block_bytes / GIB:.3f} GiB of host memory and "
            f"{(fixed + summaries / (1 - share)) / GIB:.3f} GiB of GPU memory per rank "
            f"(buffers of a step {fixed / GIB:.3f} GiB, {held} "
            f"{summaries / GIB:.3f} GiB, the rest hot head pages); there are {host_bytes / GIB:.3f} GiB of "
            f"host memory and {gpu_bytes / GIB:.3f} GiB of GPU memory for KV. Lower --max-model-len or "
            f"--max-num-batched-tokens, or raise sparse.offload.host_gib or --gpu-memory-utilization"
        )
    return Split(num_blocks, slots_beside(num_blocks, shape, limits, gpu_bytes, hot_fraction))

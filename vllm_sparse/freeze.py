"""Freeze: the pages that the last queries of a prompt attend to, listed once and kept while it decodes.

After the attention of every chunk of prefill, each KV head's list goes into the summary row of the page that
holds the chunk's last token, in numbers of 16 bits: the page itself, how many pages are listed, how many to
attend to beside the sinks, and the listed pages, best first. A later chunk leaves a list of its own, so that
of the last one counts. Page numbers count within the request, so requests that share the page share the list,
and whatever moves or copies pages takes it along. :mod:`vllm_sparse.kernels.page_write` clears the header of
each page that begins, which is why preemption and reuse of blocks need no code; decode steps find the list by
:mod:`vllm_sparse.kernels.frozen_score`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.config import ConfigError, SparseConfig
from vllm_sparse.probe import BUNDLE_HEADS, PROBE_TOKENS, probe_groups, probe_parts
from vllm_sparse.query_blocks import QueryBlocks
from vllm_sparse.summaries import list_capacity

logger = logging.getLogger("vllm.vllm_sparse")

MAX_PAGES = 65536
"""Page numbers are stored in 16 bits."""
PARTS_BYTES = 32 << 20
"""Room for the sums of 16 query heads at 128K tokens in 16 bit, enough to fill a GPU; more only where one
bundle of heads needs it."""
PROBE_SPLITS = 64
"""Most programs that share the context of one query head."""
LEAST_SHARE = 0.25
"""Of a mean budget, which every head gets where heads share theirs; Ada-KV calls it a safeguard."""


@dataclass
class FreezeBuffers:
    """Device memory of the probe, shared by all layers of equal head counts, used by one chunk at a time."""

    page_size: int
    q_heads: int
    part_lse: torch.Tensor
    """float32 [q_heads, PROBE_SPLITS, 2, PROBE_TOKENS]."""
    parts: torch.Tensor
    """Sums per query and page, of as many heads at once as fit; empty on a CPU."""
    mass: torch.Tensor
    """float32 [q_heads * (groups + 1) * max_pages], cut to each context."""

    @classmethod
    def allocate(
        cls,
        q_heads: int,
        page_size: int,
        max_context_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FreezeBuffers:
        max_pages = -(-max_context_tokens // page_size) + 1
        least = probe_parts(max_pages * page_size)
        every_head = least * -(-q_heads // BUNDLE_HEADS)
        parts = max(least, min(every_head, PARTS_BYTES // dtype.itemsize)) if device.type != "cpu" else 0
        masses = q_heads * (probe_groups(page_size) + 1) * max_pages
        return cls(
            page_size=page_size,
            q_heads=q_heads,
            part_lse=torch.zeros(q_heads, PROBE_SPLITS, 2, PROBE_TOKENS, dtype=torch.float32, device=device),
            parts=torch.zeros(parts, dtype=dtype, device=device),
            mass=torch.zeros(masses, dtype=torch.float32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.part_lse, self.parts, self.mass))

    def masses(self, chunk: QueryBlocks) -> torch.Tensor:
        """Uninitialised float32 [q_heads, groups + 1, num_pages]."""
        shape = (self.q_heads, probe_groups(self.page_size) + 1, chunk.num_pages(self.page_size))
        return self.mass[: shape[0] * shape[1] * shape[2]].view(shape)


@dataclass
class Freeze:
    """What a layer lists: numbers of pages are those of its config."""

    buffers: FreezeBuffers
    sink_pages: int
    window_tokens: int
    budget_pages: int
    shares: bool
    """Whether the layer's KV heads share out their budgets by mass, up to twice ``budget_pages`` each."""
    scale: float

    def list_pages(self, q: torch.Tensor, kv: torch.Tensor, block_table: torch.Tensor, chunk: QueryBlocks) -> None:
        """Leave a list of each KV head in the last page of ``chunk``; only device work, and no waiting.

        Args:
            q: [num_tokens, q_heads, head_dim], all tokens of the step.
            kv: [num_blocks, kv_heads, page_size + 1, 2 * head_dim], these tokens included.
            block_table: int32 [num_reqs, max_pages].
            chunk: queries of one request.
        """
        run, buffers, page_size = kernels.for_device(q.device), self.buffers, self.buffers.page_size
        blocks, mass = block_table[chunk.request], None
        if chunk.end_position >= PROBE_TOKENS:
            mass = buffers.masses(chunk)
            run.probe_mass(
                q[chunk.tokens()], kv, blocks, chunk, page_size, self.scale, buffers.part_lse, buffers.parts, mass
            )
        mean, least, most = self._budgets()
        run.list_pages(mass, kv, blocks, chunk, page_size, self.sink_pages, self.window_tokens, mean, least, most)

    def _budgets(self) -> tuple[int, int, int]:
        """Pages beside the sinks: in the mean of all KV heads, and the least and most of any."""
        mean = self.budget_pages - self.sink_pages
        if not self.shares:
            return mean, mean, mean
        # So many at least that the window is within the half that recent pages can have.
        window_pages = -(-self.window_tokens // self.buffers.page_size) + 1
        least = min(mean, max(int(LEAST_SHARE * mean), 2 * window_pages))
        return mean, least, 2 * self.budget_pages - self.sink_pages


def check(config: SparseConfig, page_size: int, head_dim: int, item_bytes: int, max_context_tokens: int) -> None:
    """Refuse what a list in one summary row cannot hold.

    Raises:
        ConfigError: a budget or a context that is too large.
    """
    from vllm_sparse.policies import get_decode_policy

    policy = get_decode_policy(config.decode_policy)
    pages = config.budget_pages(page_size) if policy.largest_share > 1 else config.largest_pages(page_size)
    always = config.sink_pages(page_size) + -(-config.window_tokens // page_size)
    capacity = list_capacity(head_dim, item_bytes)
    if pages - always > capacity:
        raise ConfigError(
            f"sparse.budget_tokens: {pages} pages of {page_size} tokens with "
            f"decode_policy={config.decode_policy!r}, which lists {capacity} pages at head size {head_dim} beside "
            f"the {always} that are always attended; allowed: up to {(capacity + always) * page_size} tokens for "
            f"a KV head, or a larger --block-size"
        )
    if policy.largest_share > 1 and capacity < int(policy.largest_share * pages) - always:
        logger.info("sparse attention: no KV head gets more than the %d pages that a list holds", capacity)
    if -(-max_context_tokens // page_size) > MAX_PAGES:
        raise ConfigError(
            f"sparse.decode_policy: {config.decode_policy!r} counts pages in 16 bits, and {max_context_tokens} "
            f"tokens of context take more than {MAX_PAGES} of {page_size}; allowed: a smaller --max-model-len or "
            f"a larger --block-size"
        )

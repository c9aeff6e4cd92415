"""SparsePrefill: attention of one request's chunk over the pages that a policy chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.pages.selection import Selection
from vllm_sparse.policies.base import PrefillPolicy
from vllm_sparse.prefill.buffers import PrefillBuffers

MIN_CHUNK_TOKENS = BLOCK_TOKENS
"""Queries up to which a chunk runs dense: to estimate its pages would cost what attending does.

Drafts that lie behind prompts in a step are as short, so they run dense too; vLLM's CPU-side lengths only bound
theirs."""


def plan_chunks(
    query_starts: list[int],
    seq_lens: list[int],
    min_prefill_tokens: int,
    first_request: int = 0,
    min_chunk_tokens: int = MIN_CHUNK_TOKENS,
) -> list[QueryBlocks]:
    """Chunks of a step that run sparse, of the requests from ``first_request`` on.

    Args:
        query_starts: [num_reqs + 1], first query of each request among the step's tokens.
        seq_lens: [num_reqs], context tokens with this step's.
        min_prefill_tokens: up to this context a chunk runs dense.
        min_chunk_tokens: up to this many queries it runs dense.
    """
    chunks = []
    for request in range(first_request, len(seq_lens)):
        start, end, seq_len = query_starts[request], query_starts[request + 1], seq_lens[request]
        if end - start > min_chunk_tokens and seq_len > min_prefill_tokens:
            chunks.append(QueryBlocks(request, start, end - start, seq_len - (end - start)))
    return chunks


@dataclass
class SparsePrefill:
    """Policy, attention kernel and buffers of a layer; sinks and window are the same for all policies."""

    policy: PrefillPolicy
    attention: AttentionKernel
    buffers: PrefillBuffers
    selection: Selection
    """Sinks and window."""
    geometry: Geometry

    def warm_up(self, page_slots: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Compile what a chunk launches, so that the first long request does not wait for it.

        Layers of equal shape share it. ``page_slots``: slots of the pages that chunks read.
        """
        kv_heads, q_heads, head_dim = self.geometry.kv_heads, self.geometry.q_heads, self.geometry.head_dim
        device, page_size = self.buffers.head_pages.device, self.buffers.page_size
        chunk = QueryBlocks(0, 0, BLOCK_TOKENS, 0)
        pages = chunk.num_pages(page_size)
        if pages > self.buffers.max_pages:
            return  # no context is as long as a block
        kv = torch.zeros(pages, kv_heads, page_slots, 2 * head_dim, dtype=kv_dtype, device=device)
        q = torch.zeros(BLOCK_TOKENS, q_heads, head_dim, dtype=dtype, device=device)
        block_table = torch.arange(pages, dtype=torch.int32, device=device)[None]
        self.attend(q, kv, block_table, chunk, torch.empty_like(q))
        self.buffers.counters.zero_()

    def pages_in_reach(self, chunk: QueryBlocks) -> torch.Tensor | None:
        """Pages before ``chunk`` that :meth:`attend` may read, whatever they hold: int32, ascending, on the CPU.

        None: any. Only pages that are complete before the chunk count.
        """
        reached = self.policy.pages_in_reach(chunk, self.buffers.q_heads)
        if reached is None:
            return None
        window_start = (
            max(0, chunk.first_position + 1 - max(1, self.selection.window_tokens)) // self.buffers.page_size
        )
        reached[: self.selection.sink_pages] = True
        reached[window_start:] = True
        return reached.nonzero().squeeze(1).int()

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        block_table: torch.Tensor,
        chunk: QueryBlocks,
        out: torch.Tensor,
    ) -> None:
        """Write the attention of ``chunk`` to its rows of ``out``.

        Args:
            q, out: [num_tokens, q_heads, head_dim], all tokens of the step.
            kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim], these tokens included.
            block_table: int32 [num_reqs, max_pages].
            chunk: queries of one request.
        """
        for blocks, table in self._choices(q, kv, block_table, chunk, self.buffers.counters):
            tokens = blocks.tokens()
            self.attention.attend_blocks(q[tokens], kv, table, self.geometry, out[tokens], self.buffers.scratch)

    def look(self, q: torch.Tensor, kv: torch.Tensor, block_table: torch.Tensor, chunk: QueryBlocks) -> None:
        """Count in ``buffers.looks`` the pairs that :meth:`attend` would attend to; attend to none."""
        for _ in self._choices(q, kv, block_table, chunk, self.buffers.looks):
            pass

    def _choices(self, q, kv, block_table, chunk, counters) -> Iterator[tuple[QueryBlocks, PageTable]]:
        """Parts of ``chunk`` with the pages that they choose, counted in ``counters``."""
        buffers, pages = self.buffers, block_table[chunk.request]
        self.policy.estimate(q[chunk.tokens()], kv, pages, chunk, self.geometry, buffers)
        for blocks in chunk.split(buffers.blocks_at_once(chunk)):
            keep, table = buffers.keep_mask(blocks), buffers.table(blocks)
            self.policy.choose(q[blocks.tokens()], kv, pages, blocks, self.geometry, buffers, keep)
            kernels.for_device(q.device).prefill_table(keep, pages, blocks, kv, self.selection, counters, table)
            yield blocks, table

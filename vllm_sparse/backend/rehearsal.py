"""Rehearsal: the calls of a step that allocate, made while vLLM measures what a step needs.

What lasts lies in the workspace. Beside it a step's calls allocate and free: attention kernels for log-sums and
for the parts of rows that they split, selection for the candidates of long contexts. vLLM runs the model once, at
its largest step and without metadata, and gives what is left of the GPU to the KV cache. In that run these calls
are made, each at the sizes at which it takes most and over rows without tokens, so that no step needs more than
was measured. Kernels are loaded by it, too, which takes memory that is not torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.backend.workspace import Workspace
from vllm_sparse.config import SparseConfig
from vllm_sparse.offload.store import MOST_IN_PLACE
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS
from vllm_sparse.pages.query_tokens import ONE, QueryTokens


@dataclass
class Rehearsal:
    """The calls of one layer, over a cache of one page."""

    config: SparseConfig
    workspace: Workspace
    attention: AttentionKernel
    prefill_attention: AttentionKernel
    kv: torch.Tensor
    """[1, kv_heads, page_size + summary slots, 2 * head_dim]."""
    geometry: Geometry

    def run(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """Make every call; ``output`` holds nothing afterwards.

        Args:
            query, output: [num_tokens, q_heads, head_dim] of a step as large as any.
        """
        if self.config.decode_policy != "dense":
            for most in {1, self.workspace.query_tokens}:
                for rows in _sizes(min(len(query) // most, len(self.workspace.plan.table_seq_lens))):
                    self.decode(query, output, rows, most)
        buffers = self.workspace.prefill
        if buffers is not None:
            for blocks in _sizes(min(buffers.max_blocks, -(-len(query) // BLOCK_TOKENS))):
                tokens = min(len(query), blocks * BLOCK_TOKENS)
                self.attend_blocks(query[:tokens], output[:tokens], blocks)

    def decode(self, query: torch.Tensor, output: torch.Tensor, rows: int, most: int) -> None:
        """Select and attend for ``rows`` rows of no context with up to ``most`` query tokens each."""
        workspace, queries = self.workspace, ONE
        if most > 1:
            starts = torch.zeros(rows + 1, dtype=torch.int32, device=query.device)
            queries = QueryTokens(most, starts)
        query, output = query[: rows * most], output[: rows * most]
        table = workspace.table.rows(rows * workspace.kv_heads, queries)
        plan = workspace.plan.rows(rows, queries)
        for of_last_step in (table.lengths, plan.table_seq_lens, plan.totals):
            of_last_step.zero_()
        block_table = self._block_table(rows)
        table.routes, table.block_table = plan.score_offsets, block_table
        kernels.for_device(query.device).select_pages(
            workspace.scores, block_table, plan, self.kv, self.config.selection(self.geometry.page_size), table
        )
        self.attention.attend_rows(query, self.kv, table, self.geometry, output)
        coded = self.config.offload is not None and self.config.offload.host_dtype == "fp8"
        if coded and self.kv.dtype is not torch.float8_e4m3fn:
            torch.empty(min(MOST_IN_PLACE, workspace.kv_heads * rows * workspace.max_pages),
                        dtype=torch.int32, device=query.device)  # fmt: skip

    def attend_blocks(self, query: torch.Tensor, output: torch.Tensor, blocks: int) -> None:
        """Attend for ``blocks`` query blocks over no pages, with a table as wide as the buffers let it be."""
        buffers = self.workspace.prefill
        rows = buffers.q_heads * blocks
        pages = min(buffers.max_pages, len(buffers.head_pages) // rows)
        table = PageTable(
            buffers.head_pages[: rows * pages].view(rows, pages),
            buffers.lengths[:rows],
            buffers.starts[: rows + 1],
        )
        table.lengths.zero_()
        table.starts.zero_()
        self.prefill_attention.attend_blocks(
            query,
            self.kv,
            table,
            self.geometry,
            output,
            buffers.scratch,
        )

    def _block_table(self, rows: int) -> torch.Tensor:
        """int32 [rows, max_pages]: every page is the one there is."""
        pages = torch.zeros(1, self.workspace.max_pages, dtype=torch.int32, device=self.kv.device)
        return pages.expand(rows, -1)


def _sizes(most: int) -> Iterator[int]:
    """Powers of two below ``most``, and ``most``: a call allocates most with all rows, or with a few that it
    splits."""
    size = 1
    while size < most:
        yield size
        size *= 2
    if most:
        yield most

"""PrefillBuffers: all device memory of sparse prefill, allocated once and bounded at any context.

A chunk is attended in parts whose query blocks fit the buffers. The largest of these are, for 32 query heads,
head_dim 128, 16-bit queries and page 16:

    page table    64 MiB   int32 [blocks * heads, pages]: 64 blocks at 128K tokens of context, 8 at 1M
    keep mask     16 MiB   uint8, a quarter of the table
    scratch       96 MiB   queries and outputs by head: 6144 tokens of 2 * 8 KiB
    estimate      26 MiB   at 1M tokens: per (head, page) two float32, one int32, one uint8

203 MiB at 1M tokens of context, 161 MiB at 128K. A chunk's masses lie where its tables come later: at 64
heads and 1M tokens they, not the tables, set that size, and all of it is 250 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.probe import PROBE_TOKENS, probe_groups, probe_parts
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks

TABLE_BYTES = 64 << 20
SCRATCH_BYTES = 96 << 20
PROBE_SPLITS = 64
"""Most programs that share the context of one query head in an estimate."""


@dataclass
class PrefillBuffers:
    """Shared by all layers of equal head counts, used by one chunk at a time."""

    page_size: int
    q_heads: int
    max_blocks: int
    """Most query blocks attended at once, at any context."""
    head_pages: torch.Tensor
    """int32 [capacity]: page tables, cut to the width of each context."""
    keep: torch.Tensor
    """uint8 [capacity]: pages to keep, one for each of ``head_pages``."""
    lengths: torch.Tensor
    """int32 [max_blocks * q_heads]."""
    starts: torch.Tensor
    """int32 [max_blocks * q_heads + 1]."""
    masses: torch.Tensor
    """float32 [2, q_heads, max_pages]: estimated mass of pages, and of bands of diagonals."""
    page_keep: torch.Tensor
    """uint8 [q_heads, max_pages]: pages that every block keeps."""
    band_count: torch.Tensor
    """int32 [q_heads, max_pages + 1]: kept bands of diagonals before each band."""
    query_aware: torch.Tensor
    """uint8 [q_heads]: 1: blocks choose pages for themselves, 0: they share the chunk's columns and bands."""
    probe_lse: torch.Tensor
    """float32 [q_heads, PROBE_SPLITS, 2, PROBE_TOKENS]."""
    pooled: torch.Tensor
    """[max_blocks * q_heads, head_dim]: mean queries of blocks."""
    scratch: torch.Tensor
    """[2, max_blocks * BLOCK_TOKENS * q_heads * head_dim or more]: an estimate's sums, or logits, per query and
    page; then, for attention kernels that want them so, queries and outputs by head. Empty on a CPU."""
    counters: torch.Tensor
    """int64 [2], running totals: (query, key) pairs attended, and causal ones; all layers and heads."""
    looks: torch.Tensor
    """The same of chunks whose choice was only counted."""

    @classmethod
    def allocate(
        cls,
        q_heads: int,
        head_dim: int,
        page_size: int,
        max_context_tokens: int,
        max_chunk_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PrefillBuffers:
        """Buffers for chunks of up to ``max_chunk_tokens`` in contexts of up to ``max_context_tokens``."""
        max_pages = -(-max_context_tokens // page_size) + 1
        token_bytes = 2 * q_heads * head_dim * dtype.itemsize
        chunk_tokens = min(max_chunk_tokens, max_context_tokens, SCRATCH_BYTES // token_bytes)
        max_blocks = max(1, -(-chunk_tokens // BLOCK_TOKENS))
        row_bytes = 4 * q_heads * max_pages
        capacity = min(max_blocks * row_bytes, max(TABLE_BYTES, row_bytes)) // 4
        # The masses of an estimate lie in the table's memory, see ``probe_masses``.
        capacity = max(capacity, q_heads * (probe_groups(page_size) + 1) * max_pages)
        gpu = device.type != "cpu"
        scratch = max(max_blocks * BLOCK_TOKENS * q_heads * head_dim, probe_parts(max_pages * page_size) // 2)

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            page_size=page_size,
            q_heads=q_heads,
            max_blocks=max_blocks,
            head_pages=zeros(capacity, dtype=torch.int32),
            keep=zeros(capacity, dtype=torch.uint8),
            lengths=zeros(max_blocks * q_heads, dtype=torch.int32),
            starts=zeros(max_blocks * q_heads + 1, dtype=torch.int32),
            masses=zeros(2, q_heads, max_pages, dtype=torch.float32),
            page_keep=zeros(q_heads, max_pages, dtype=torch.uint8),
            band_count=zeros(q_heads, max_pages + 1, dtype=torch.int32),
            query_aware=zeros(q_heads, dtype=torch.uint8),
            probe_lse=zeros(q_heads, PROBE_SPLITS, 2, PROBE_TOKENS, dtype=torch.float32),
            pooled=zeros(max_blocks * q_heads, head_dim, dtype=dtype),
            scratch=zeros(2, scratch if gpu else 0, dtype=dtype),
            counters=zeros(2, dtype=torch.int64),
            looks=zeros(2, dtype=torch.int64),
        )

    @property
    def max_pages(self) -> int:
        return self.page_keep.shape[1]

    @property
    def num_bytes(self) -> int:
        tensors = (value for value in vars(self).values() if isinstance(value, torch.Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def blocks_at_once(self, chunk: QueryBlocks) -> int:
        """Query blocks of ``chunk`` whose page tables fit."""
        row = self.q_heads * chunk.num_pages(self.page_size)
        return max(1, min(self.max_blocks, self.head_pages.shape[0] // row))

    def table(self, blocks: QueryBlocks) -> PageTable:
        """An uninitialised table for ``blocks``, [q_heads * num_blocks] rows."""
        rows, pages = self.q_heads * blocks.num_blocks, blocks.num_pages(self.page_size)
        head_pages = self.head_pages[: rows * pages].view(rows, pages)
        return PageTable(head_pages, self.lengths[:rows], self.starts[: rows + 1])

    def keep_mask(self, blocks: QueryBlocks) -> torch.Tensor:
        """An uninitialised mask uint8 [q_heads * num_blocks, num_pages]."""
        rows, pages = self.q_heads * blocks.num_blocks, blocks.num_pages(self.page_size)
        return self.keep[: rows * pages].view(rows, pages)

    def scores(self, blocks: QueryBlocks) -> torch.Tensor:
        """Float32 [q_heads * num_blocks, num_pages], in the memory of these blocks' table."""
        rows, pages = self.q_heads * blocks.num_blocks, blocks.num_pages(self.page_size)
        return self.head_pages.view(torch.float32)[: rows * pages].view(rows, pages)

    def probe_masses(self, chunk: QueryBlocks) -> torch.Tensor:
        """Float32 [q_heads, groups + 1, num_pages], in memory that the chunk's tables take later."""
        shape = (self.q_heads, probe_groups(self.page_size) + 1, chunk.num_pages(self.page_size))
        return self.head_pages.view(torch.float32)[: shape[0] * shape[1] * shape[2]].view(shape)

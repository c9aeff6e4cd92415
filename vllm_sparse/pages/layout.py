"""Where the pages of a KV cache lie in vLLM's blocks: taken from checked strides, never assumed."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

PAGE_SIZES = (16, 32, 64, 128, 256)
"""Tokens per page: powers of two (kernel tiles) and multiples of 16 (FlashAttention-3)."""
MAX_HEAD_PAGE = 2**31 - 1
"""Head pages are int32."""
ALIGNED_BYTES = 16
"""What attention kernels load at once: no head page may start between."""


@dataclass(frozen=True)
class HeadPageGrid:
    """Where the head pages of a cache start: evenly spaced places, of which pages take some.

    vLLM may pad a block to the size of another layer's, or put other layers' blocks between two of this one, so
    blocks need not be a whole number of this layer's pages apart. What divides both distances is the spacing.
    """

    stride: int
    """Elements from one head page to the next."""
    per_block: int
    """Head pages from one block to the next."""
    per_head: int
    """Head pages from one KV head of a block to the next."""

    @classmethod
    def of(cls, kv: torch.Tensor) -> HeadPageGrid:
        """The grid of ``kv`` [num_blocks, kv_heads, rows, 2 * head_dim]."""
        block, head = kv.stride(0), kv.stride(1)
        if kv.shape[1] == 1:
            head = block  # of one head no stride is ever taken
        stride = gcd(block, head)
        return cls(stride, block // stride, head // stride)

    def head_pages(self, blocks: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Head pages of integer tensors that broadcast, int64."""
        return blocks.long() * self.per_block + heads * self.per_head

    def split(self, head_pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and KV heads of ``head_pages``."""
        return head_pages // self.per_block, head_pages % self.per_block // self.per_head

    def count(self, num_blocks: int, kv_heads: int) -> int:
        """One more than the last head page."""
        return (num_blocks - 1) * self.per_block + (kv_heads - 1) * self.per_head + 1


def single_head_pages(kv: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``kv`` as single-head pages, each [num_head_pages, page_size, 1, head_dim], no copy.

    ``kv``: [num_blocks, kv_heads, rows, 2 * head_dim], each row ``[K | V]``; rows past ``page_size``
    hold the summary and are left out.
    """
    num_blocks, kv_heads, _, content = kv.shape
    head_dim, grid = content // 2, HeadPageGrid.of(kv)
    shape = (grid.count(num_blocks, kv_heads), page_size, 1, head_dim)
    # The head dimension has size 1; a TMA descriptor still wants its stride aligned.
    strides = (grid.stride, kv.stride(2), kv.stride(2), 1)
    offset = kv.storage_offset()
    return kv.as_strided(shape, strides, offset), kv.as_strided(shape, strides, offset + head_dim)


def summaries_as_pages(summaries: torch.Tensor, page_size: int) -> torch.Tensor:
    """``summaries`` [num_blocks, kv_heads, summary slots, 2 * head_dim] as pages that have ``page_size`` rows too.

    For policies, which read only what follows row ``page_size``; the rows before it mean nothing. Kernels read
    on from there byte by byte, so no copy is needed for them. References index rows: where there are several a CPU
    gets a copy.
    """
    num_blocks, kv_heads, rows, content = summaries.shape
    if rows > 1 and not summaries.is_cuda:
        return torch.nn.functional.pad(summaries, (0, 0, page_size, 0))
    strides = (summaries.stride(0), summaries.stride(1), 0, 1)
    return summaries.as_strided((num_blocks, kv_heads, page_size + rows, content), strides)


def unreadable(kv: torch.Tensor, page_slots: int) -> str | None:
    """Why kernels cannot work on ``kv``, or None.

    Args:
        kv: what vLLM gave a layer: [num_blocks, kv_heads, page_slots, 2 * head_dim], in any order of memory that
            keeps a row in one piece.
        page_slots: rows that the layer's pages have, summary included.
    """
    found = f"a KV cache of shape {tuple(kv.shape)} and strides {tuple(kv.stride())}"
    if kv.dim() != 4 or kv.shape[2] != page_slots:
        return f"{found} is not [blocks, KV heads, {page_slots} rows of a page, 2 * head size]"
    if kv.stride(3) != 1 or kv.stride(2) != kv.shape[3]:
        return f"{found} does not keep the rows of a page together"
    grid = HeadPageGrid.of(kv)
    if grid.stride * kv.element_size() % ALIGNED_BYTES:
        return f"{found} starts pages at places that are not multiples of {ALIGNED_BYTES} bytes"
    if grid.count(kv.shape[0], kv.shape[1]) > MAX_HEAD_PAGE:
        return f"{found} has more places for pages than 32 bits can number; fewer blocks would do"
    return None

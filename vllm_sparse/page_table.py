"""PageTable: the one way to say which pages are attended, shared by policies and engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PageTable:
    """Pages to attend for each (request, KV head), as units of one paged KV cache.

    A *unit* is a page of one KV head. With a cache ``[num_blocks, kv_heads, rows, 2 * head_dim]``
    unit ``block * units_per_block + head`` starts ``unit * kv.stride(1)`` elements into the cache
    (see :func:`single_head_pages`), so each row here is an ordinary block table over single-head
    pages, and any paged attention kernel can be an engine.

    Invariants: ids in a row ascend with the position of the page in its context, so the page that
    may be partly filled is the last; entries past ``ceil(lengths / page_size)`` are undefined.
    """

    units: torch.Tensor
    """int32 [num_reqs * kv_heads, max_pages]; row ``req * kv_heads + head``."""
    lengths: torch.Tensor
    """int32 [num_reqs * kv_heads]: tokens attended. 0: the row is not attended through this table."""
    starts: torch.Tensor | None = None
    """int32 [rows + 1], of query blocks alone: the first query of each row, and after them the number of all,
    where queries lie by head. None in decode, where a row is one token."""

    @classmethod
    def empty(cls, num_reqs: int, kv_heads: int, max_pages: int, device: torch.device) -> PageTable:
        rows = num_reqs * kv_heads
        return cls(
            units=torch.zeros(rows, max_pages, dtype=torch.int32, device=device),
            lengths=torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def rows(self, num_rows: int) -> PageTable:
        """The first ``num_rows`` rows, without a copy."""
        return PageTable(self.units[:num_rows], self.lengths[:num_rows])


def units_per_block(kv: torch.Tensor) -> int:
    """Unit ids between two neighbouring blocks of ``kv`` [num_blocks, kv_heads, rows, 2 * head_dim]."""
    return kv.stride(0) // kv.stride(1)


def single_head_pages(kv: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``kv`` as single-head pages, each [num_units, page_size, 1, head_dim], no copy.

    ``kv``: [num_blocks, kv_heads, rows, 2 * head_dim], each row ``[K | V]``; rows past ``page_size``
    hold the summary and are left out.
    """
    num_blocks, kv_heads, _, content = kv.shape
    head_dim = content // 2
    num_units = (num_blocks - 1) * units_per_block(kv) + kv_heads
    shape = (num_units, page_size, 1, head_dim)
    # The head dimension has size 1; a TMA descriptor still wants its stride aligned.
    strides = (kv.stride(1), kv.stride(2), kv.stride(2), 1)
    offset = kv.storage_offset()
    return kv.as_strided(shape, strides, offset), kv.as_strided(shape, strides, offset + head_dim)


def summaries_as_pages(summaries: torch.Tensor, page_size: int) -> torch.Tensor:
    """``summaries`` [num_blocks, kv_heads, summary rows, 2 * head_dim] as pages of ``page_size`` rows before them.

    For policies, which read only what follows row ``page_size``; the rows before it mean nothing. Kernels read
    on from there byte by byte, so no copy is needed for them. Twins index rows: where there are several a CPU
    gets a copy.
    """
    num_blocks, kv_heads, rows, content = summaries.shape
    if rows > 1 and not summaries.is_cuda:
        return torch.nn.functional.pad(summaries, (0, 0, page_size, 0))
    strides = (summaries.stride(0), summaries.stride(1), 0, 1)
    return summaries.as_strided((num_blocks, kv_heads, page_size + rows, content), strides)


def check_cache_layout(kv: torch.Tensor) -> None:
    """Raise where units of ``kv`` are not evenly spaced (the layout every kernel relies on)."""
    if kv.stride(3) != 1 or kv.stride(0) % kv.stride(1):
        raise ValueError(
            f"KV cache of shape {tuple(kv.shape)} and strides {kv.stride()} is not laid out as "
            f"[block, head, row, 2 * head_dim]"
        )

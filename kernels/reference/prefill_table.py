"""Reference of :mod:`vllm_sparse.kernels.prefill_table`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.query_blocks import block_spans
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.pages.selection import Selection


def prefill_table(
    keep: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    kv: torch.Tensor,
    selection: Selection,
    counters: torch.Tensor,
    table: PageTable,
) -> None:
    page_size = selection.page_size
    start, end = block_spans(blocks, keep.device)
    pages, q_heads = keep.shape[1], keep.shape[0] // blocks.num_blocks
    page = torch.arange(pages, device=keep.device)
    window_start = (start + 1 - max(selection.window_tokens, 1)).clamp(min=0) // page_size
    before_end = -(-end // page_size)
    always = (page < selection.sink_pages) | (page >= window_start[:, None])
    chosen = (keep.bool().unflatten(0, (q_heads, -1)) | always) & (page < before_end[:, None])
    lengths = end - (before_end - chosen.sum(-1)) * page_size
    table.lengths.copy_(lengths.flatten())
    heads = torch.arange(q_heads, device=keep.device)[:, None]
    table.starts[:-1] = (heads * blocks.num_tokens + start - blocks.first_position).flatten()
    table.starts[-1] = q_heads * blocks.num_tokens
    head = torch.arange(q_heads, device=keep.device) // (q_heads // kv.shape[1])
    head_page = HeadPageGrid.of(kv).head_pages(block_table[:pages], head[:, None])
    for row, mask in enumerate(chosen.flatten(0, 1)):
        head_pages = head_page[row // blocks.num_blocks, mask]
        table.head_pages[row, : len(head_pages)] = head_pages.int()
    queries = end - start
    unseen = queries * (queries - 1) // 2
    counters[0] += (queries * lengths - unseen).sum()
    counters[1] += (queries * end - unseen).sum() * q_heads

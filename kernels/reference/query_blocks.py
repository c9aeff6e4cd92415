"""Positions of query blocks and the keys of their context, for the prefill references."""

from __future__ import annotations

import torch

from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks


def block_spans(blocks: QueryBlocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and end position of each block, int64 [num_blocks]."""
    start = blocks.first_position + torch.arange(blocks.num_blocks, device=device) * BLOCK_TOKENS
    return start, (start + BLOCK_TOKENS).clamp(max=blocks.end_position)


def context_keys(kv: torch.Tensor, block_table: torch.Tensor, blocks: QueryBlocks, page_size: int) -> torch.Tensor:
    """float32 [kv_heads, num_pages, page_size, head_dim], 0 past the last query."""
    pages, head_dim = blocks.num_pages(page_size), kv.shape[3] // 2
    keys = kv[block_table[:pages].long(), :, :page_size, :head_dim].transpose(0, 1).float()
    position = torch.arange(pages * page_size, device=kv.device).view(pages, page_size, 1)
    return keys.masked_fill(position >= blocks.end_position, 0)

"""Reference of :mod:`vllm_sparse.kernels.position_pattern`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.hash_uniform import hash_uniform
from vllm_sparse.kernels.reference.query_blocks import block_spans
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.query_blocks import QueryBlocks


def position_pattern(pattern: PositionPattern, blocks: QueryBlocks, page_size: int, keep: torch.Tensor) -> None:
    start, end = (x[:, None] for x in block_spans(blocks, keep.device))
    q_heads = keep.shape[0] // blocks.num_blocks
    page = torch.arange(keep.shape[1], device=keep.device)
    head = torch.arange(q_heads, device=keep.device)[:, None, None]
    last = (end - 1) // page_size
    nearest = (start - (page * page_size + page_size - 1)).clamp(min=0)
    farthest = end - 1 - page * page_size
    every = pattern.dilated_heads
    dilation = torch.where(head % every == every - 1, pattern.dilation, 1)
    chosen = (nearest < pattern.recent_tokens * dilation) & ((last - page) % dilation == 0)
    chosen |= page * page_size < pattern.initial_tokens
    if pattern.stride_tokens:
        chosen |= farthest // pattern.stride_tokens * pattern.stride_tokens >= nearest
    if pattern.random_tokens:
        random_pages = -(-pattern.random_tokens // page_size)
        chosen |= hash_uniform(start, head, page) * (last + 1) < random_pages
    keep.copy_((chosen & (farthest >= 0)).flatten(0, 1))

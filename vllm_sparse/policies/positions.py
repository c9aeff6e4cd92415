"""Prefill policies that choose by position alone: rows of one table of patterns."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparse import kernels
from vllm_sparse.kernels.reference.hash_uniform import hash_uniform
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.policies.base import PrefillPolicy, PrefillSizes

MOST_HASHES = 1 << 17
"""Hashes for the random pages of a chunk, about a millisecond of the host; beyond, all pages count as drawn."""
HASHES_AT_ONCE = 1 << 15
"""Hashes held in memory together."""
MOST_TOKENS = 1 << 29
"""Size that no context reaches; a pattern doubles it in 32 bits."""

Sized = Callable[[int, int], PositionPattern]
"""A function from ``vertical_tokens`` and ``slash_tokens`` to a pattern."""


def a_shape(vertical: int, slash: int) -> PositionPattern:
    """``vertical`` first and ``slash`` recent tokens.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, as a prefill pattern
    in Jiang et al., "MInference 1.0", arXiv 2407.02490.
    """
    return PositionPattern(initial_tokens=vertical, recent_tokens=slash)


def strided(vertical: int, slash: int) -> PositionPattern:
    """``slash`` recent tokens, and distances that are multiples of ``slash``.

    Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509.
    """
    return PositionPattern(recent_tokens=slash, stride_tokens=slash)


def dilated(vertical: int, slash: int) -> PositionPattern:
    """``vertical`` first tokens, and every second page of the last ``slash`` tokens.

    The dilated baseline of Jiang et al., "MInference 1.0", arXiv 2407.02490, by pages instead of diagonals: a
    block of 128 queries would need every page for every second diagonal.
    """
    return PositionPattern(initial_tokens=vertical, recent_tokens=slash // 2, dilation=2)


def longformer(vertical: int, slash: int) -> PositionPattern:
    """``vertical`` first tokens, and a window of ``slash``, spread over twice the distance in every second head.

    Beltagy et al., "Longformer", arXiv 2004.05150. In a decoder only the keys of global tokens are global;
    dilation is by pages.
    """
    return PositionPattern(initial_tokens=vertical, recent_tokens=slash, dilation=2, dilated_heads=2)


def bigbird(vertical: int, slash: int) -> PositionPattern:
    """``vertical`` first, ``slash`` recent and ``slash`` random tokens.

    Zaheer et al., "Big Bird", arXiv 2007.14062: global, window and random blocks, here of a page. In a decoder
    only the keys of global tokens are global.
    """
    return PositionPattern(initial_tokens=vertical, recent_tokens=slash, random_tokens=slash)


class ByPosition(PrefillPolicy):
    """Pages by a :class:`PositionPattern`, the same for any content."""

    def __init__(self, pattern: Sized, sizes: PrefillSizes, page_size: int, patterns: HeadPatterns):
        super().__init__(sizes, page_size, patterns)
        self.pattern = pattern(min(sizes.vertical_tokens, MOST_TOKENS), min(sizes.slash_tokens, MOST_TOKENS))

    def pages_in_reach(self, chunk, q_heads):
        """Pages that :mod:`vllm_sparse.kernels.position_pattern` keeps for some head and block.

        A union that is computed without going through all pairs of head and block.
        """
        pattern, size = self.pattern, self.page_size
        page = torch.arange(max(0, chunk.first_position) // size, dtype=torch.int32, device="cpu")
        first_token = page * size
        reached = first_token < pattern.initial_tokens
        # Of all blocks the first one is nearest to a page.
        nearest = chunk.first_position + 1 - size - first_token
        if pattern.dilation == 1 or pattern.dilated_heads > 1:
            reached |= nearest < pattern.recent_tokens
        if pattern.dilation > 1 and q_heads >= pattern.dilated_heads:
            for place, start in self._dilated_starts(chunk, pattern.dilation).items():
                behind = start - chunk.first_position
                near = nearest + behind < pattern.recent_tokens * pattern.dilation
                reached |= near & (page % pattern.dilation == place)
        if pattern.stride_tokens:
            # Distances of a block begin where those of the block before it end.
            farthest = chunk.end_position - 1 - first_token
            reached |= farthest // pattern.stride_tokens * pattern.stride_tokens >= nearest
        if pattern.random_tokens:
            random_pages = -(-pattern.random_tokens // size)
            undrawn = _undrawn(page[~reached], random_pages, chunk, size, q_heads)
            reached.fill_(True)[undrawn.long()] = False
        return reached

    def _dilated_starts(self, chunk: QueryBlocks, dilation: int) -> dict[int, int]:
        """Start of the first block that keeps pages at each place among ``dilation`` pages."""
        starts: dict[int, int] = {}
        for block in chunk.split(1):
            starts.setdefault((block.end_position - 1) // self.page_size % dilation, block.first_position)
        return starts

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        kernels.for_device(q.device).position_pattern(self.pattern, blocks, self.page_size, keep)


def _undrawn(
    pages: torch.Tensor, random_pages: int, chunk: QueryBlocks, page_size: int, q_heads: int
) -> torch.Tensor:
    """The part of ``pages`` that no (query head, block) of the chunk draws; empty where telling takes too long."""
    start = torch.arange(chunk.num_blocks, dtype=torch.int32, device="cpu") * BLOCK_TOKENS + chunk.first_position
    seen_pages = ((start + BLOCK_TOKENS).clamp(max=chunk.end_position) - 1) // page_size + 1
    head = torch.arange(q_heads, dtype=torch.int32, device="cpu")
    rows = torch.stack([start.repeat(q_heads), head.repeat_interleave(len(start)), seen_pages.repeat(q_heads)])
    share = min(1.0, random_pages / int(seen_pages[-1]))
    # Every row draws its share of the pages that are left.
    if len(pages) * (1 - (1 - share) ** rows.shape[1]) / share > MOST_HASHES:
        return pages[:0]
    while rows.shape[1] and len(pages):
        start, head, seen_pages = rows[:, : max(1, HASHES_AT_ONCE // len(pages)), None]
        draws = hash_uniform(start, head, pages).mul_(seen_pages)
        pages = pages[draws.amin(0) >= random_pages]
        rows = rows[:, len(start) :]
    return pages

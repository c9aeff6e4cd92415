"""QueryBlocks: consecutive prefill queries of one request, in blocks that choose pages for themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_TOKENS = 128
"""Queries of a block: one tile of FlashAttention-3 at head_dim 128."""


@dataclass(frozen=True)
class QueryBlocks:
    """Query tokens of one request in one step, counted on the host: a chunk, or a part of it.

    Blocks are counted from the first token, wherever in its page that lies; the last one may be
    partial. Row ``head * num_blocks + block`` of a page table is one (query head, block).
    """

    request: int
    """Row of the step's block table."""
    first_token: int
    """Row of the first query in the step's tokens."""
    num_tokens: int
    first_position: int
    """Position of the first query in its context: tokens before it come from earlier steps."""

    @property
    def end_position(self) -> int:
        """Context tokens up to the last query, itself included."""
        return self.first_position + self.num_tokens

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_TOKENS)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of a query and a key that is not after it."""
        return self.num_tokens * (2 * self.first_position + self.num_tokens + 1) // 2

    def num_pages(self, page_size: int) -> int:
        """Pages up to the last query's."""
        return -(-self.end_position // page_size)

    def tokens(self) -> slice:
        """These queries among the step's tokens."""
        return slice(self.first_token, self.first_token + self.num_tokens)

    def split(self, max_blocks: int) -> Iterator[QueryBlocks]:
        """Parts of about equal size, of at most ``max_blocks`` blocks; of whole pairs if that is not one, so that
        parts pair the blocks that the whole does."""
        unit = min(2, max_blocks)
        parts = -(-self.num_blocks // (max_blocks // unit * unit))
        step = -(-self.num_blocks // (parts * unit)) * unit * BLOCK_TOKENS
        for start in range(0, self.num_tokens, step):
            yield QueryBlocks(
                self.request,
                self.first_token + start,
                min(step, self.num_tokens - start),
                self.first_position + start,
            )

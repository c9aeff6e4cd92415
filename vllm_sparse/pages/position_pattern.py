"""PositionPattern: prefill pages by position alone, what the fixed policies share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PositionPattern:
    """Pages that a block of queries keeps; a page counts as soon as any of its tokens does.

    Distances are from a query back to a key. Parts of a pattern add up; 0 leaves a part out.
    """

    initial_tokens: int = 0
    """First tokens of the context."""
    recent_tokens: int = 0
    """Tokens kept of those before a query, without the ones that dilation skips."""
    dilation: int = 1
    """Recent pages are every ``dilation``-th, counted back from the block's last, and reach that much farther."""
    dilated_heads: int = 1
    """The last of each ``dilated_heads`` query heads is dilated; 1: all are."""
    stride_tokens: int = 0
    """Tokens at distances that are a multiple of this."""
    random_tokens: int = 0
    """Tokens, on average, in pages drawn by a hash of (block, query head, page)."""

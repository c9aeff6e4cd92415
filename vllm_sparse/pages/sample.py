"""The sample of queries that is asked which pages matter to two blocks, and the stretches of keys it looks at."""

from __future__ import annotations

from vllm_sparse.pages.query_blocks import BLOCK_TOKENS

SAMPLE_BLOCKS = 2
"""Blocks of queries that share their answers, counted from the first one of a part."""
SAMPLE_EVERY = 8
"""Of so many queries in turn the last one is asked."""
SAMPLE_ROWS = BLOCK_TOKENS // SAMPLE_EVERY
"""Asked queries of a block."""
STRETCH_TOKENS = 16
"""Keys of which an asked query's largest logit is taken: the smallest page, or a part of a larger one."""
STRETCHES = 4
"""Stretches whose logits lie together in memory."""
LEAST_SPLIT_TOKENS = 1024
"""Fewest keys of a program, where several share a context."""
MOST_SPLITS = 64
"""Most programs that share the context of the same asked queries."""


def sample_logits(context_tokens: int) -> int:
    """Logits of one query head and block over a context: one for each asked query and stretch."""
    return SAMPLE_ROWS * STRETCHES * -(-context_tokens // (STRETCHES * STRETCH_TOKENS))


def most_splits(context_tokens: int) -> int:
    """Most programs that share a context of so many tokens."""
    return min(MOST_SPLITS, max(1, context_tokens // LEAST_SPLIT_TOKENS))


def sample_room(context_tokens: int) -> int:
    """Elements of 16 bits for one query head and block: its logits, and each program's sums of them in 32 bits."""
    return sample_logits(context_tokens) + 2 * SAMPLE_ROWS * most_splits(context_tokens)

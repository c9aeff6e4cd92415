"""The probe: the last queries of a chunk, which estimate where all of it attends."""

from __future__ import annotations

from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks

PROBE_TOKENS = 64
"""Positions of a probe; one tile of tensor cores, and what MInference uses."""
BUNDLE_HEADS = 4
"""Most query heads of a group that read their keys together."""
LEAST_TILE_TOKENS = 16
"""Least tokens of a tile of keys, which holds no more than a page."""
COVER_OCTAVES = 24
"""Powers of two, down from the largest mass, within which the threshold of a ``top_p`` is sought."""
COVER_ROUNDS = 13
"""Halvings of that search, which find the threshold to 0.3 % of itself."""


def probe_start(chunk: QueryBlocks, page_size: int) -> int:
    """Position of the probe's first row, a multiple of the page size or of 64.

    The probe ends at the next such border at or after the chunk's end, so that each of its rows
    meets the keys of a page in the same two bands of diagonals; rows past the end have no query.
    """
    align = min(page_size, PROBE_TOKENS)
    return -(-chunk.end_position // align) * align - PROBE_TOKENS


def probe_queries(chunk: QueryBlocks, page_size: int) -> QueryBlocks:
    """The last queries of a chunk, which the probe holds: one block of up to 64."""
    first = max(probe_start(chunk, page_size), chunk.first_position)
    before = first - chunk.first_position
    return QueryBlocks(chunk.request, chunk.first_token + before, chunk.num_tokens - before, first)


def probe_page(chunk: QueryBlocks, page_size: int) -> int:
    """Page of the probe's first row."""
    return probe_start(chunk, page_size) // page_size


def probe_groups(page_size: int) -> int:
    """Pages that the probe's rows lie in."""
    return max(1, PROBE_TOKENS // page_size)


def probe_parts(context_tokens: int) -> int:
    """Most elements that the sums of one bundle of query heads take, two per query and page or tile of keys."""
    return 2 * BUNDLE_HEADS * PROBE_TOKENS * (-(-context_tokens // LEAST_TILE_TOKENS) + PROBE_TOKENS)


def band_shift(page_size: int) -> int:
    """What a band of diagonals costs beside a page, as a distance of float32 bit patterns.

    A band alone touches ``128 / page + 2`` pages of a block and shares most of them with neighbours;
    half of ``128 / page`` stands between, and at least 1. Powers of two are steps of the exponent.
    """
    return max(0, (BLOCK_TOKENS // (2 * page_size)).bit_length() - 1) << 23

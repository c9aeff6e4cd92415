"""Constants of :mod:`vllm_sparse.pages` that kernels read; the only globals Triton takes are ``tl.constexpr``."""

from __future__ import annotations

import triton.language as tl

from vllm_sparse.pages import decode_plan, page_scores, query_blocks, sample, summaries

BLOCK_TOKENS: tl.constexpr = tl.constexpr(query_blocks.BLOCK_TOKENS)
CHUNK: tl.constexpr = tl.constexpr(page_scores.CHUNK_PAGES)
EVERY_PAGE: tl.constexpr = tl.constexpr(decode_plan.EVERY_PAGE)
WHOLE: tl.constexpr = tl.constexpr(decode_plan.WHOLE)
PROMPT: tl.constexpr = tl.constexpr(decode_plan.PROMPT)
MOST_SPLITS: tl.constexpr = tl.constexpr(sample.MOST_SPLITS)
SAMPLE_BLOCKS: tl.constexpr = tl.constexpr(sample.SAMPLE_BLOCKS)
SAMPLE_EVERY: tl.constexpr = tl.constexpr(sample.SAMPLE_EVERY)
SAMPLE_ROWS: tl.constexpr = tl.constexpr(sample.SAMPLE_ROWS)
STRETCH: tl.constexpr = tl.constexpr(sample.STRETCH_TOKENS)
STRETCHES: tl.constexpr = tl.constexpr(sample.STRETCHES)
TILE: tl.constexpr = tl.constexpr(summaries.TILE_TOKENS)
PRECISION: tl.constexpr = tl.constexpr("ieee")
"""Of matrix products: float32 keeps all of its bits."""

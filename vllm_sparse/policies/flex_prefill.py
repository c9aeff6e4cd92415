"""FlexPrefill: each head chooses between block-sparse and vertical-slash, chunk by chunk."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.pages.probe import probe_queries
from vllm_sparse.policies.block_scores import BlockSparse
from vllm_sparse.policies.vertical_slash import VerticalSlash

QUERY_AWARE_DISTANCE = 0.1
"""The threshold tau of the paper's experiments."""


class FlexPrefill(VerticalSlash):
    """Block-sparse where mean-pooled keys foretell a head's attention, else vertical-slash.

    A head is query-aware if the attention of the chunk's last 64 queries and its estimate from their mean
    and the means of 128 keys are closer than 0.1 (:mod:`vllm_sparse.kernels.pattern_distance`); then each
    block keeps the pages that its own mean query likes best, as ``block_sparse`` does. All other heads keep what
    ``vertical_slash`` keeps. With ``prefill_top_p`` 0 each kind of head has its policy's sizes.

    Lai et al., "FlexPrefill", ICLR 2025, arXiv 2502.20766, with these differences: what is kept is pages, not
    blocks of 128 keys; a query-aware block reaches ``prefill_top_p`` (the paper's gamma, 0.9) by itself, not
    all blocks of a head together; columns and diagonals reach it together, not each kind for itself,
    which pays twice for what both hold; and no number of tokens is kept at least.
    """

    def __init__(self, sizes, page_size, patterns):
        super().__init__(sizes, page_size, patterns)
        self.by_block = BlockSparse(sizes, page_size, patterns)

    def estimate(self, q, kv, block_table, chunk, geometry, buffers):
        super().estimate(q, kv, block_table, chunk, geometry, buffers)
        run, probe = kernels.for_device(q.device), probe_queries(chunk, self.page_size)
        # Bands are chosen, so the masses that chose them are free; those of the probe are still there.
        scores = buffers.masses[0, :, : chunk.num_pages(self.page_size)]
        run.pooled_score(q[-probe.num_tokens :], kv, block_table, probe, geometry, buffers.pooled, scores)
        run.pattern_distance(
            buffers.probe_masses(chunk), scores, chunk, self.page_size, QUERY_AWARE_DISTANCE, buffers.query_aware
        )

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        # To write bands for all heads, and over some of them, is cheap; to pool and sort is not.
        super().choose(q, kv, block_table, blocks, geometry, buffers, keep)
        self.by_block.choose(q, kv, block_table, blocks, geometry, buffers, keep, heads=buffers.query_aware)

"""XAttention: the pages that hold most attention along antidiagonals."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.block_sparse import BlockSparse


class XAttention(BlockSparse):
    """Every block's attention, sampled along antidiagonals of stride 16, ranks its pages.

    It keeps as many tokens as ``vertical_tokens`` and ``slash_tokens`` together, or with
    ``prefill_coverage`` (the paper's threshold, 0.9) the fewest pages that hold that share. Xu et al.,
    "XAttention", ICML 2025, arXiv 2503.16428, by pages instead of blocks of 128 keys.
    """

    def choose(self, q, kv, block_table, blocks, scale, buffers, keep):
        run, scores = kernels.for_device(q.device), buffers.scores(blocks)
        run.antidiagonal_score(q, kv, block_table, blocks, self.page_size, scale, scores)
        run.select_row_pages(scores, blocks, self.page_size, self.row_pages, self.config.prefill_coverage, keep)

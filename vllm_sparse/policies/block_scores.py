"""Prefill policies in which each block of queries ranks pages for itself."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import PrefillPolicy


class BlockSparse(PrefillPolicy):
    """The pages whose mean key a block's mean query likes best.

    With ``prefill_top_p`` it keeps the fewest pages that hold that share, else ``vertical_tokens`` and
    ``slash_tokens`` together. The block-sparse pattern of Jiang et al., "MInference 1.0", arXiv 2407.02490, with
    pages of 16 instead of blocks of 64 keys.
    """

    @property
    def row_pages(self) -> int:
        """Pages that a block keeps where no share is asked for."""
        return -(-(self.sizes.vertical_tokens + self.sizes.slash_tokens) // self.page_size)

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep, heads=None):
        """Write ``keep``, as the base class says.

        Args:
            heads: uint8 [q_heads], above 0 where rows are to be written; None: everywhere.
        """
        run, scores = kernels.for_device(q.device), buffers.scores(blocks)
        run.pooled_score(q, kv, block_table, blocks, geometry, buffers.pooled, scores, heads)
        run.select_row_pages(scores, blocks, self.page_size, self.row_pages, self.sizes.top_p, keep, heads)


class XAttention(BlockSparse):
    """The pages with most attention along antidiagonals of stride 16.

    Sizes are those of :class:`BlockSparse`; ``prefill_top_p`` is the paper's threshold, there 0.9. Xu et al.,
    "XAttention", ICML 2025, arXiv 2503.16428, by pages instead of blocks of 128 keys.
    """

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        run, scores = kernels.for_device(q.device), buffers.scores(blocks)
        run.antidiagonal_score(q, kv, block_table, blocks, geometry, scores)
        run.select_row_pages(scores, blocks, self.page_size, self.row_pages, self.sizes.top_p, keep)

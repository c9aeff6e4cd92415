"""Block-sparse: the pages whose mean key the block's mean query likes best."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.prefill_base import PrefillPolicy


class BlockSparse(PrefillPolicy):
    """Mean-pooled queries and keys rank the pages of each block.

    It keeps as many tokens as ``vertical_tokens`` and ``slash_tokens`` together, or with
    ``prefill_coverage`` the fewest pages that hold that share. The block-sparse pattern of Jiang et al.,
    "MInference 1.0", arXiv 2407.02490, with pages of 16 instead of blocks of 64 keys.
    """

    def choose(self, q, kv, block_table, blocks, scale, buffers, keep, heads=None):
        """As in the base class; with ``heads``, uint8 [q_heads], only rows of those above 0 are written."""
        run, scores = kernels.for_device(q.device), buffers.scores(blocks)
        run.pooled_score(q, kv, block_table, blocks, self.page_size, scale, buffers.pooled, scores, heads)
        run.select_row_pages(
            scores, blocks, self.page_size, self.row_pages, self.config.prefill_coverage, keep, heads
        )

    @property
    def row_pages(self) -> int:
        return -(-(self.config.vertical_tokens + self.config.slash_tokens) // self.page_size)

"""Sampled queries: the pages that an eighth of the queries attend to most."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import PrefillPolicy


class SampledQueries(PrefillPolicy):
    """The fewest pages that hold ``prefill_top_p`` of a block's attention, as every eighth query has it there and
    in the block beside it.

    Each asked query is multiplied with every key before it, and a page's share of its attention is estimated from
    the largest logit of each 16 keys (:mod:`vllm_sparse.kernels.sample_mass`). A block's own pages count with what
    they are estimated to hold, and are attended anyway. With ``prefill_top_p`` 0 it keeps ``vertical_tokens`` and
    ``slash_tokens`` together.

    This project's. That few queries tell where many attend is in Jiang et al., "MInference 1.0", arXiv 2407.02490,
    which asks the last ones of a chunk for all of its blocks.
    """

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        run, scores, sizes = kernels.for_device(q.device), buffers.scores(blocks), self.sizes
        run.sample_mass(q, kv, block_table, blocks, geometry, buffers.scratch, scores)
        wanted_pages = -(-(sizes.vertical_tokens + sizes.slash_tokens) // self.page_size)
        run.select_row_pages(scores, blocks, self.page_size, wanted_pages, sizes.top_p, keep, own_pages=True)

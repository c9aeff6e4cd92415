"""Vertical-slash: the columns and diagonals that a chunk's last queries attend to."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import PrefillPolicy


class VerticalSlash(PrefillPolicy):
    """Pages with the most mass for all blocks, and bands of diagonals, estimated from 64 queries.

    Each head has a pattern (:mod:`vllm_sparse.pages.head_patterns`): the fewest columns and bands that together
    hold a share of the head's mass, or a number of each (:mod:`vllm_sparse.kernels.select_bands`). Without
    tuned patterns all heads have ``prefill_top_p``, or ``vertical_tokens`` and ``slash_tokens``. Jiang et al.,
    "MInference 1.0", NeurIPS 2024, arXiv 2407.02490. Columns are taken by the page and diagonals by the band of a
    page's width.
    """

    def estimate(self, q, kv, block_table, chunk, geometry, buffers):
        run, mass = kernels.for_device(q.device), buffers.probe_masses(chunk)
        run.probe_mass(q, kv, block_table, chunk, geometry, buffers.probe_lse, buffers.scratch, mass)
        run.select_bands(
            mass, chunk, self.page_size, self.patterns, self.sizes.sink_pages, buffers.masses, buffers.page_keep,
            buffers.band_count,
        )  # fmt: skip

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        run = kernels.for_device(q.device)
        run.vertical_slash(buffers.page_keep, buffers.band_count, blocks, self.page_size, keep)

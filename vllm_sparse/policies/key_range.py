"""Policies that rank pages by the range of their keys per channel."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class KeyRange(DecodePolicy):
    """The logit of a key ``slack`` of the way from the centre of the page's key range to its farthest corner.

    ``scale * (q . centre + slack * |q| . half_range)``, from one summary slot a page
    (:mod:`vllm_sparse.kernels.range_score`). The presets:

    - ``quest``, slack 1: no key of the page can have a larger logit. Tang et al., "Quest: Query-Aware Sparsity for
      Efficient Long-Context LLM Inference", ICML 2024, arXiv 2406.10774.
    - ``midbound``, slack 1/2: Quest's bound assumes a key that is extreme in every channel at once; no page holds
      one, and the excess differs from page to page. The half was chosen on one prompt of one model.
    - ``arkvale``, slack 0: the mean of the least and largest logit, the cuboid-mean digest of Chen et al.,
      "ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction", NeurIPS 2024; pages that
      are not chosen are skipped here, never evicted.
    """

    summary = "key_range"

    def __init__(self, slack: float):
        self.slack = slack

    def score(self, q, kv, block_table, plan, geometry, scores):
        kernels.for_device(q.device).range_score(q, kv, block_table, plan, geometry, scores, self.slack)

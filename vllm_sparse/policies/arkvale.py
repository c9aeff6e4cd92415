"""ArkVale: rank pages by the logit of their centre."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class ArkVale(DecodePolicy):
    """``q . centre`` of the cuboid that bounds the page's keys: the mean of its least and largest logit.

    Chen et al., "ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction",
    NeurIPS 2024, its cuboid-mean digest. What is not chosen is skipped here, never evicted.
    """

    summary = "key_range"

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        score = kernels.for_device(q.device).quest_score
        score(q, kv, block_table, plan, page_size, scale, scores, 0.0)

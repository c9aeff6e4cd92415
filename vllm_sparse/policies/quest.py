"""Quest: rank pages by an upper bound of their attention logits."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Quest(DecodePolicy):
    """``sum_d max(q_d * min_d, q_d * max_d)`` from the page's per-channel key range.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,
    arXiv 2406.10774.
    """

    summary = "key_range"

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        kernels.for_device(q.device).quest_score(q, kv, block_table, plan, page_size, scale, scores)

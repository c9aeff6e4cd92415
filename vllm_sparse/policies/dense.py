"""Dense: every page, through vLLM's own attention; the baseline inside the same backend."""

from __future__ import annotations

from vllm_sparse.policies.base import DecodePolicy


class Dense(DecodePolicy):
    """Chooses every page, so there is nothing to score: the backend attends densely."""

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        raise AssertionError("the dense policy has no scores; the backend attends to every page")

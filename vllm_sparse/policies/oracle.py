"""Oracle: rank pages by their exact attention mass, the ceiling for any selector."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Oracle(DecodePolicy):
    """The log-sum-exp of a page's true logits. It reads every key: for evaluation, not for speed."""

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        kernels.for_device(q.device).page_mass(q, kv, block_table, plan, page_size, scale, scores)

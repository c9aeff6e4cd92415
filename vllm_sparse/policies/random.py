"""Random: the floor that every selector must beat."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Random(DecodePolicy):
    """A hash of (context length, head, page): new pages each step, the same on every run."""

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        kernels.for_device(q.device).random_score(block_table, plan, page_size, scores)

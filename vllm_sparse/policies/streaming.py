"""Streaming: sinks and the most recent pages."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Streaming(DecodePolicy):
    """Attention sinks plus a recent window that fills the budget; blind to the query.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
    arXiv 2309.17453. Pages are skipped here, never evicted.
    """

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        kernels.for_device(q.device).recency_score(block_table, plan, page_size, scores)

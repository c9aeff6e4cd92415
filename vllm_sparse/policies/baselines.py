"""Policies to measure others against: everything, the best choice, the most recent pages, and chance."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy, PrefillPolicy


class Dense(DecodePolicy):
    """Every page: rows run vLLM's own attention, and nothing is scored."""

    def score(self, q, kv, block_table, plan, geometry, scores):
        raise AssertionError("dense decode scores nothing; the backend attends to every page")


class DensePrefill(PrefillPolicy):
    """Every page: chunks run vLLM's own attention, and nothing is chosen."""

    def choose(self, q, kv, block_table, blocks, geometry, buffers, keep):
        raise AssertionError("dense prefill keeps everything; the backend attends to every page")


class Oracle(DecodePolicy):
    """The log-sum-exp of a page's true logits, the ceiling of any selector; reads every key."""

    def score(self, q, kv, block_table, plan, geometry, scores):
        kernels.for_device(q.device).page_mass(q, kv, block_table, plan, geometry, scores)


class Streaming(DecodePolicy):
    """Attention sinks and the most recent pages, blind to the query.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453; pages are
    skipped here, never evicted.
    """

    def score(self, q, kv, block_table, plan, geometry, scores):
        kernels.for_device(q.device).recency_score(block_table, plan, geometry.page_size, scores)


class Random(DecodePolicy):
    """A hash of (context length, head, page), the floor of any selector: new at each step, alike in each run."""

    def score(self, q, kv, block_table, plan, geometry, scores):
        kernels.for_device(q.device).random_score(block_table, plan, geometry.page_size, scores)

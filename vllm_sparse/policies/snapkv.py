"""SnapKV: the pages that a prompt's last queries attended to, the same in every step."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy
from vllm_sparse.summaries import FROZEN


class SnapKV(DecodePolicy):
    """Pages are listed once, after prefill (:mod:`vllm_sparse.freeze`), by the attention of the last 64 queries.

    New pages come first as they are written, up to half of the budget; then the list, best first. Li et al.,
    "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv 2404.14469, with one
    choice for the query heads that share a KV head, and whole pages, where it pools over neighbours. There the
    other keys are dropped; here they are skipped, and their memory stays taken. A last chunk of fewer queries
    (the rest in the prefix cache, or a prompt just past a chunk's end) chooses by those.
    """

    summary = FROZEN

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        score = kernels.for_device(q.device).frozen_score
        score(kv, block_table, plan, page_size, scores, self.adaptive)

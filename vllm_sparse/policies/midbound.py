"""Midbound: rank pages halfway between their centre and Quest's bound."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy

SLACK = 0.5


class Midbound(DecodePolicy):
    """``q . centre + 1/2 |q| . half-range`` from the page's per-channel key range.

    Quest's bound assumes a key that is extreme in every channel at once; no page holds one, and the
    excess differs from page to page; this counts half of it, from the same bytes. The half was chosen
    on one prompt of one model. Summary from Tang et al., arXiv 2406.10774.
    """

    summary = "key_range"

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        score = kernels.for_device(q.device).quest_score
        score(q, kv, block_table, plan, page_size, scale, scores, SLACK)

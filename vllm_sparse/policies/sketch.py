"""Sketch: rank pages by their attention mass, estimated from 1-bit codes of all their keys."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Sketch(DecodePolicy):
    """The log-sum-exp of a page's logits, with each key as its page's mean and the signs of what is left.

    What is left is rotated first, so that one scale per key fits all channels. This project's; the codes
    are those of Gao and Long, "RaBitQ", arXiv 2405.12497, with a Hadamard rotation as in Ashkboos et al.,
    "QuaRot", arXiv 2404.00456.
    """

    summary = "sketch1"

    def score(self, q, kv, block_table, plan, page_size, scale, scores):
        score = kernels.for_device(q.device).sketch_score
        score(q, kv, block_table, plan, page_size, scale, scores, self.summary)

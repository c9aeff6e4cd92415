"""Policies that rank pages by their attention mass, estimated from low-bit codes of all their keys."""

from __future__ import annotations

from vllm_sparse import kernels
from vllm_sparse.policies.base import DecodePolicy


class Sketch(DecodePolicy):
    """The log-sum-exp of a page's logits, with each key as its page's mean and a code of what is left.

    What is left is rotated first, so that one scale per key fits all channels
    (:mod:`vllm_sparse.kernels.sketch_score`). This project's; the codes are those of Gao and Long, "RaBitQ",
    arXiv 2405.12497, with a Hadamard rotation as in Ashkboos et al., "QuaRot", arXiv 2404.00456. The presets:

    - ``sketch``: 1 bit, the sign, for each channel of a key.
    - ``sketch2``: 2 bits, four levels.
    - ``twilight``: ``sketch2`` with the fewest pages that hold ``top_p`` of the estimated mass, a number of its
      own for each head and request; the budget is the most that a KV head takes. Lin et al., "Twilight: Adaptive
      Attention Sparsity with Hierarchical Top-p Pruning", NeurIPS 2025, arXiv 2502.02770, with pages instead of
      tokens, one set for the query heads that share a KV head, and 2-bit codes in place of its 4-bit keys. The
      counts of attended tokens are those of the budget.
    """

    def __init__(self, bits: int, adaptive: bool = False):
        self.summary, self.adaptive = f"sketch{bits}", adaptive

    def score(self, q, kv, block_table, plan, geometry, scores):
        kernels.for_device(q.device).sketch_score(q, kv, block_table, plan, geometry, scores, self.summary)

"""Twilight: as many pages as hold a share of the attention, a number of their own for each head and request."""

from __future__ import annotations

from vllm_sparse.policies.sketch2 import Sketch2


class Twilight(Sketch2):
    """Top-p: the fewest pages that hold ``decode_coverage`` of the mass that ``sketch2`` estimates.

    The budget is the most that a KV head takes. Lin et al., "Twilight: Adaptive Attention Sparsity with
    Hierarchical Top-p Pruning", NeurIPS 2025, arXiv 2502.02770, with pages instead of tokens, one set for
    the query heads that share a KV head, and 2-bit codes in place of its 4-bit keys. The counts of attended
    tokens are those of the budget.
    """

    adaptive = True

"""Dilated: the first tokens, and every second page of the recent ones."""

from __future__ import annotations

from vllm_sparse.pages.position_pattern import FixedPattern
from vllm_sparse.policies.fixed import FixedPolicy


class Dilated(FixedPolicy):
    """``vertical_tokens`` first tokens and every second page of the last ``slash_tokens``.

    The dilated baseline of Jiang et al., "MInference 1.0", arXiv 2407.02490, by pages instead of
    diagonals: a block of 128 queries would need every page for every second diagonal.
    """

    def pattern(self, vertical_tokens, slash_tokens):
        return FixedPattern(initial_tokens=vertical_tokens, recent_tokens=slash_tokens // 2, dilation=2)

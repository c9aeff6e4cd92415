"""Longformer: a window, dilated in some heads, and global tokens."""

from __future__ import annotations

from vllm_sparse.pages.position_pattern import FixedPattern
from vllm_sparse.policies.fixed import FixedPolicy


class Longformer(FixedPolicy):
    """A window of ``slash_tokens``, spread over twice the distance in every second head.

    ``vertical_tokens`` first tokens are global. Beltagy et al., "Longformer", arXiv 2004.05150. In a
    decoder only the keys of global tokens are global; dilation is by pages.
    """

    def pattern(self, vertical_tokens, slash_tokens):
        return FixedPattern(
            initial_tokens=vertical_tokens, recent_tokens=slash_tokens, dilation=2, dilated_heads=2
        )

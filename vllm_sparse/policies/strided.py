"""Strided: recent tokens, and every so many before them."""

from __future__ import annotations

from vllm_sparse.pages.position_pattern import FixedPattern
from vllm_sparse.policies.fixed import FixedPolicy


class Strided(FixedPolicy):
    """``slash_tokens`` recent tokens, and distances that are multiples of as many.

    Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509.
    """

    def pattern(self, vertical_tokens, slash_tokens):
        return FixedPattern(recent_tokens=slash_tokens, stride_tokens=slash_tokens)

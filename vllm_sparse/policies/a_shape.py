"""A-shape: the first tokens and the most recent ones."""

from __future__ import annotations

from vllm_sparse.pages.position_pattern import FixedPattern
from vllm_sparse.policies.fixed import FixedPolicy


class AShape(FixedPolicy):
    """``vertical_tokens`` first and ``slash_tokens`` recent tokens.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, as a
    prefill pattern in Jiang et al., "MInference 1.0", arXiv 2407.02490.
    """

    def pattern(self, vertical_tokens, slash_tokens):
        return FixedPattern(initial_tokens=vertical_tokens, recent_tokens=slash_tokens)

"""BigBird: global, recent and random tokens."""

from __future__ import annotations

from vllm_sparse.pages.position_pattern import FixedPattern
from vllm_sparse.policies.fixed import FixedPolicy


class BigBird(FixedPolicy):
    """``vertical_tokens`` first, ``slash_tokens`` recent and as many random tokens.

    Zaheer et al., "Big Bird", arXiv 2007.14062: global, window and random blocks, here of a page. In a
    decoder only the keys of global tokens are global.
    """

    def pattern(self, vertical_tokens, slash_tokens):
        return FixedPattern(initial_tokens=vertical_tokens, recent_tokens=slash_tokens, random_tokens=slash_tokens)

"""What some models do to logits before softmax (:class:`vllm_sparse.pages.geometry.Geometry`), as kernels do it.

Soft caps: Gemma Team, "Gemma 2", arXiv 2408.00118. Sink logits: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card",
arXiv 2508.10925; Miller, "Attention Is Off By One", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(logits, cap):
    """``cap * tanh(logits / cap)``, in any unit that both have."""
    return cap - 2 * cap / (tl.exp2(logits * (2 * 1.4426950408889634 / cap)) + 1)


@triton.jit
def with_sinks(top, total, sinks):
    """A running softmax with one more logit each, to base 2, that has no value: largest logit and sum of weights,
    and what weights so far are to be multiplied with."""
    new_top = tl.maximum(top, sinks)
    fade = tl.exp2(top - new_top)
    return new_top, total * fade + tl.exp2(sinks - new_top), fade

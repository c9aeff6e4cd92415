"""The transform of :mod:`vllm_sparse.kernels.hadamard`."""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform along the last dimension, a power of two, scaled to keep lengths."""
    width = x.shape[-1]
    span = 1
    while span < width:
        left, right = x.unflatten(-1, (-1, 2, span)).unbind(-2)
        x = torch.stack([left + right, left - right], -2).flatten(-3)
        span *= 2
    return x * width**-0.5

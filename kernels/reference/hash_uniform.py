"""The hash of :mod:`vllm_sparse.kernels.hash_uniform`."""

from __future__ import annotations

import torch


def hash_uniform(length, head: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in [0, 1), a pure function of its arguments (the Triton kernels have the same).

    A 32-bit finaliser (murmur3) over a mix of a length, a query head and a page index. In int32, which wraps:
    the host draws by it too.
    """
    length = torch.as_tensor(length, device=page.device)
    x = length.int() * _signed(0xC2B2AE3D) + head.int() * _signed(0x85EBCA77) + page.int() * _signed(0x9E3779B1)
    x ^= _shifted(x, 16)
    x *= _signed(0x85EBCA6B)
    x ^= _shifted(x, 13)
    x *= _signed(0xC2B2AE35)
    x ^= _shifted(x, 16)
    return _shifted(x, 8).float().div_(1 << 24)


def _signed(x: int) -> int:
    """The int32 of the same bits."""
    return x - (x >> 31 << 32)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 to the right, with zeros for a sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)

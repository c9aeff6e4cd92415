"""e4m3: units in 8 bits, ``code * 2^exponent``, with one exponent for K and one for V of a unit.

    exponent = the least with which the largest finite magnitude is at most 448, the largest code
    code     = x / 2^exponent, rounded to the nearest of e4m3, ties to even; NaN where x is not finite

Powers of two, so that a page under way can be written again with a larger exponent: codes then lose nothing
more unless they become subnormal. By integer operations, since GPUs before compute capability 8.9 convert no
e4m3. "FP8 Formats for Deep Learning", Micikevicius et al. (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BIAS = 127
"""Of a stored exponent, a byte: that of float32."""


@triton.jit
def exponent_of(most):
    """The stored exponent for values up to ``most``, in float32."""
    bits = most.to(tl.int32, bitcast=True)
    return tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)


@triton.jit
def power_of(exponent):
    """``2^exponent`` of a stored exponent, in float32."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x, exponent):
    """Codes of ``x``, in float32, that the stored ``exponent`` fits; uint8."""
    scaled = x * power_of(254 - exponent)
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Added to 2^14, whose last place is the least code, a float is rounded to a multiple of it.
    subnormal = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(tl.abs(x) < float("inf"), code, 0x7F).to(tl.uint8)


@triton.jit
def from_e4m3(code, exponent, MOST: tl.constexpr):
    """What codes stand for, in float32: exact in the dtype whose largest number is ``MOST``."""
    bits = code.to(tl.int32)
    half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    x = half.to(tl.float32) * 256.0 * power_of(exponent)
    x = tl.minimum(tl.maximum(x, -MOST), MOST)  # the largest code may be above what it was rounded from
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), x)


def codes_of(host: torch.Tensor, exponents: torch.Tensor | None) -> torch.Tensor:
    """``host`` as a kernel takes it: bytes where they are e4m3, which Triton knows on some GPUs only."""
    assert (host.dtype is torch.float8_e4m3fn) == (exponents is not None)
    return host if exponents is None else host.view(torch.uint8)


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of ``dtype``."""
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0

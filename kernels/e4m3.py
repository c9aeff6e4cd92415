"""e4m3: head pages in 8 bits, ``code * 2^exponent``, with one exponent for K and one for V of a head page.

    exponent = the least with which the largest finite magnitude is at most 448, the largest code
    code     = x / 2^exponent, rounded to the nearest of e4m3, ties to even; NaN where x is not finite

An exponent is stored as in float32, with a bias of 127, in a byte.

Powers of two, so that a page under way can be written again with a larger exponent: codes then lose nothing
more unless they become subnormal. By integer operations, since GPUs before compute capability 8.9 convert no
e4m3. "FP8 Formats for Deep Learning", Micikevicius et al. (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
def power_256_of(exponent):
    """``2^(exponent + 8)`` of a stored exponent, in float32."""
    return power_of(exponent.to(tl.int32) + 8)


@triton.jit
def powers_256_of(exponents_ptr, head_page, in_value):
    """256 times the powers of a head page: of its V where ``in_value``, else of its K."""
    of_key, of_value = tl.load(exponents_ptr + 2 * head_page), tl.load(exponents_ptr + 2 * head_page + 1)
    return tl.where(in_value, power_256_of(of_value), power_256_of(of_key))


@triton.jit
def to_e4m3(x, exponent):
    """Codes of ``x``, in float32, that the stored ``exponent`` fits; int8."""
    scaled = x * power_of(254 - exponent)
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Added to 2^14, whose last place is the least code, a float is rounded to a multiple of it.
    subnormal = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.int8)


@triton.jit
def from_e4m3(code, power_256):
    """What codes stand for, in float32: exact in the dtype that they were made of.

    ``power_256``: :func:`power_256_of` their exponents. Placed in a float16, codes are 256 times too small.
    """
    x = ((code.to(tl.int32) << 7) & 0xBF80).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(tl.abs(x) < 1.875, x * power_256, float("nan"))


def codes_of(host: torch.Tensor, exponents: torch.Tensor | None) -> torch.Tensor:
    """``host`` as a kernel takes it: bytes where they are e4m3, which Triton knows on some GPUs only."""
    assert (host.dtype is torch.float8_e4m3fn) == (exponents is not None)
    return host if exponents is None else host.view(torch.int8)


def largest_coded(dtype: torch.dtype) -> float:
    """The number that larger ones are clamped to, so none rounds to infinity; of four digits, as codes are."""
    return 61440.0 if dtype is torch.float16 else 448.0 * 2.0**119


def warps_for(cells: int) -> int:
    """Warps of a program that codes ``cells`` numbers: 64 numbers a thread, 4 to 16 warps."""
    return min(16, max(4, cells // 2048))

"""e4m3: K and V in 8 bits.

A quantised KV cache holds ``code * scale``, saturated, with one scale for K and one for V of a layer. The host
pool of a 16-bit cache may hold head pages as ``code * 2^exponent``, with one exponent for K and one for V of each.

    exponent = the least with which the largest finite magnitude is at most 448, the largest code
    code     = x / 2^exponent, rounded to the nearest of e4m3, ties to even; NaN where x is not finite

An exponent is stored as in float32, with a bias of 127, in a byte.

Powers of two, so that a page under way can be written again with a larger exponent: codes then lose nothing
more unless they become subnormal. By integer operations, since GPUs before compute capability 8.9 convert no
e4m3. "FP8 Formats for Deep Learning", Micikevicius et al. (arXiv 2209.05433).
"""

from __future__ import annotations

from functools import cache

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
    return _rounded(x * power_of(254 - exponent))


@triton.jit
def saturated_e4m3(x, dtype: tl.constexpr):
    """Codes of float32 ``x``, the largest one where it is larger; ``dtype`` as :func:`elements_of` gives it."""
    if dtype == tl.float8e4nv:
        code = x.to(dtype)
    else:
        code = _rounded(tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x))
    return code


@triton.jit
def _rounded(scaled):
    """Codes of numbers up to 448."""
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Added to 2^14, whose last place is the least code, a float is rounded to a multiple of it.
    subnormal = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(scaled == scaled, code, 0x7F).to(tl.int8)


@triton.jit
def from_e4m3(code, power_256):
    """What codes stand for, in float32: exact in the dtype that they were made of.

    ``power_256``: :func:`power_256_of` their exponents. Placed in a float16, codes are 256 times too small.
    """
    x = ((code.to(tl.int32) << 7) & 0xBF80).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(tl.abs(x) < 1.875, x * power_256, float("nan"))


@triton.jit
def stored(x, dtype: tl.constexpr):
    """Elements of a cache as numbers that ``dtype`` multiplies: codes in it, exactly, others as they are."""
    if x.dtype == tl.int8:
        x = from_e4m3(x, 256.0).to(dtype)
    elif x.dtype == tl.float8e4nv:
        x = x.to(tl.float16).to(dtype)
    return x


@triton.jit
def scaled_queries(query):
    """``query`` [rows, head_dim] in float16 and below 2, and the powers of two [rows] that it was divided by.

    Codes become float16 in one instruction, bfloat16 in four, so that is what they are multiplied in. What is lost
    of a query's channels is less than 2^-24 of its largest.
    """
    wide = query.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-30)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return (wide / power[:, None]).to(tl.float16), power


@triton.jit
def coded_queries(query):
    """``query`` [rows, head_dim] in e4m3, and the powers of two [rows] that it was divided by."""
    scaled, power = scaled_queries(query)
    return (scaled.to(tl.float32) * 128).to(tl.float8e4nv), power / 128


def elements_of(kv: torch.Tensor) -> torch.Tensor:
    """``kv`` as kernels take it that call :func:`stored`: codes as bytes where a GPU cannot convert them."""
    return bytes_of(kv) if kv.dtype is torch.float8_e4m3fn and not converts_e4m3(kv.device) else kv


@cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether ``device`` has instructions for e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def bytes_of(kv: torch.Tensor) -> torch.Tensor:
    """``kv`` as kernels take it that move codes or convert them by integer operations."""
    return kv.view(torch.int8) if kv.element_size() == 1 else kv


def largest_coded(dtype: torch.dtype) -> float:
    """The number that larger ones are clamped to, so none rounds to infinity; of four digits, as codes are."""
    return 61440.0 if dtype is torch.float16 else 448.0 * 2.0**119


def warps_for(cells: int) -> int:
    """Warps of a program that codes ``cells`` numbers: 64 numbers a thread, 4 to 16 warps."""
    return min(16, max(4, cells // 2048))

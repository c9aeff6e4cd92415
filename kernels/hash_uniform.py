"""hash_uniform: a 32-bit finaliser (murmur3) over a mix of three integers, uniform in [0, 1)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hash_uniform(length, head, page):
    """The same number as ``reference.hash_uniform``: 64-bit products cut to 32 bits."""
    cut = 0xFFFFFFFF
    x = (page.to(tl.int64) * 0x9E3779B1 + head.to(tl.int64) * 0x85EBCA77
         + length.to(tl.int64) * 0xC2B2AE3D) & cut  # fmt: skip
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & cut
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & cut
    x = x ^ (x >> 16)
    # Exact, as a division by the approximate instruction need not be: the host draws the same pages.
    return (x >> 8).to(tl.float32) * (1.0 / 16777216.0)

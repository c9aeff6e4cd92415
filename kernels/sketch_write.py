"""sketch_write: every key of a tile of 16 tokens in 1 or 2 bits per channel.

With u_t the key of token t after :mod:`vllm_sparse.kernels.hadamard`, scaled to keep its length,

    mean = int8 of the mean of u over the tile's keys, times mean_scale
    R_t  = u_t - mean
    c_td = min(max(floor(R_td / (STEP * rms(R_t))) + levels / 2, 0), levels - 1)    levels = 2^bits
    key_td ~ mean_d + scale_t * (c_td - (levels - 1) / 2)

with the scale_t that makes the error least. STEP is the best step of four even levels for a normal
distribution, which rotated residuals resemble; a step that fits each level by itself loses 1 % less.
Rotation, centring and one scale per key are as in quantised attention: Ashkboos et al., "QuaRot", arXiv
2404.00456; Gao and Long, "RaBitQ", arXiv 2405.12497; which pages to attend to, from such keys, is this
project's.

A byte of plane p holds field j of token p * 8 / bits + j in bits ``bits * j`` on, less 128: so the last field,
read with the byte's sign, is ``levels / 2`` less than its code. :mod:`vllm_sparse.pages.summaries` has the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse.kernels.constants import TILE
from vllm_sparse.kernels.hadamard import hadamard

STEP: tl.constexpr = tl.constexpr(0.9957)
SMALLEST: tl.constexpr = tl.constexpr(1e-7)
"""Least scale of a mean, and least size of a residual."""


@triton.jit
def write_sketch(
    bytes_ptr, words_ptr, keys,
    BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sketch ``keys`` float32 [TILE, WIDTH].

    ``bytes_ptr``: where the tile's sketch starts, as int8; ``words_ptr``: the same as int32.
    """
    LEVELS: tl.constexpr = 1 << BITS
    PLANES: tl.constexpr = TILE * BITS // 8
    FIELDS: tl.constexpr = 8 // BITS
    dims, rows = tl.arange(0, WIDTH), tl.arange(0, TILE)
    u = hadamard(keys, TILE, WIDTH) * (WIDTH**-0.5)
    mean = tl.sum(u, axis=0) / TILE
    mean_scale = tl.maximum(tl.max(tl.abs(mean), axis=0) / 127, SMALLEST)
    rounded = tl.floor(mean / mean_scale + 0.5)
    residual = u - (rounded * mean_scale)[None, :]
    size = tl.maximum(tl.sqrt(tl.sum(residual * residual, axis=1) / WIDTH), SMALLEST)
    code = tl.floor(residual / (size * STEP)[:, None]) + LEVELS // 2
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS - 1.0)
    level = code - (LEVELS - 1) / 2
    scale = tl.sum(residual * level, axis=1) / tl.sum(level * level, axis=1)
    # bfloat16 by rounding the bits of a number that is not negative.
    scale_bits = (scale.to(tl.int32, bitcast=True) + 0x8000) >> 16
    even, odd = tl.split(tl.reshape(scale_bits, [TILE // 2, 2]))
    field = code.to(tl.int32) << (rows % FIELDS * BITS)[:, None]
    packed = tl.sum(tl.reshape(field, [PLANES, FIELDS, WIDTH]), axis=1) - 128
    planes = tl.arange(0, PLANES)
    tl.store(bytes_ptr + planes[:, None] * WIDTH + dims[None, :], packed.to(tl.int8))
    tl.store(bytes_ptr + PLANES * WIDTH + dims, rounded.to(tl.int8))
    words = words_ptr + (PLANES + 1) * WIDTH // 4
    tl.store(words + tl.arange(0, TILE // 2), even | (odd << 16))
    tl.store(words + TILE // 2, mean_scale.to(tl.int32, bitcast=True))

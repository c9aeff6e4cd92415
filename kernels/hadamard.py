"""hadamard: the Walsh-Hadamard transform, which spreads what is in one channel evenly over all.

    y[i] = sum_j (-1)^popcount(i & j) x[j]

Its own inverse up to a factor of the width; products of two transformed vectors are those of the vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halve(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr):
    """Sums and differences among ``NEAR`` neighbours; then those that lie so far apart become neighbours."""
    x = tl.reshape(x, [ROWS, WIDTH // NEAR, NEAR])
    for i in tl.static_range(3):
        if NEAR >> i > 1:
            left, right = tl.split(tl.reshape(x, [ROWS, WIDTH // NEAR, NEAR // 2, 2]))
            x = tl.permute(tl.join(left + right, left - right), [0, 1, 3, 2])
            x = tl.reshape(x, [ROWS, WIDTH // NEAR, NEAR])
    return tl.reshape(tl.permute(x, [0, 2, 1]), [ROWS, WIDTH])


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Transform float32 ``x`` [ROWS, WIDTH] along its rows, without the factor; WIDTH is a power of two."""
    tl.static_assert(WIDTH <= 512)
    # Eight at a time, which one thread can hold: threads exchange numbers in between only.
    for i in tl.static_range(0, 9, 3):
        if WIDTH >> i > 1:
            x = _halve(x, ROWS, WIDTH, min(8, WIDTH >> i))
    return x

"""hadamard: the Walsh-Hadamard transform, which spreads what is in one channel evenly over all.

    y[i] = sum_j (-1)^popcount(i & j) x[j]

Its own inverse up to a factor of the width; products of two transformed vectors are those of the vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Transform float32 ``x`` [ROWS, WIDTH] along its rows, without the factor; WIDTH is a power of two."""
    tl.static_assert(WIDTH <= 256)
    # Sums of neighbours to the front and differences to the back, as often as a width can be halved.
    for i in tl.static_range(8):
        if WIDTH >> i > 1:
            left, right = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(left + right, left - right), [0, 2, 1]), [ROWS, WIDTH])
    return x

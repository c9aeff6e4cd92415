"""two_digits: a query in int8 twice, so that int8 matrix products lose nothing that matters of it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_digits(x):
    """``x`` [dims, group], at most 127, as ``digit 0 + digit 1 / 128``: int8 [dims, 2 * group]."""
    high = tl.floor(x + 0.5)
    low = tl.floor((x - high) * 128 + 0.5)
    return tl.join(high.to(tl.int8), low.to(tl.int8)).reshape(x.shape[0], 2 * x.shape[1])

"""The query tokens of a request (:mod:`vllm_sparse.pages.query_tokens`), as kernels find them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_of(starts_ptr, request):
    """First token of a request and how many it has."""
    first, end = request, request + 1
    if starts_ptr is not None:
        first, end = tl.load(starts_ptr + request), tl.load(starts_ptr + request + 1)
    return first, end - first


@triton.jit
def mean_query(cells_ptr, starts_ptr, request, stride_token, mask):
    """Means over the tokens of a request of its queries and of their absolute values, float32.

    ``cells_ptr`` says where the queries would lie if they were those of token 0.
    """
    first, count = span_of(starts_ptr, request)
    cells = cells_ptr + first.to(tl.int64) * stride_token
    mean = tl.load(cells, mask=mask, other=0.0).to(tl.float32)
    size = tl.abs(mean)
    if starts_ptr is not None:
        for token in range(1, count):
            query = tl.load(cells + token * stride_token, mask=mask, other=0.0).to(tl.float32)
            mean += query
            size += tl.abs(query)
        mean /= count
        size /= count
    return mean, size

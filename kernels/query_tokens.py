"""Where the query tokens of a request are, for kernels of steps that verify drafts: the device code of
:class:`vllm_sparse.pages.query_tokens.QueryTokens`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_of(starts_ptr, request):
    """First token of a request and how many it has."""
    if starts_ptr is None:
        return request, 1
    first = tl.load(starts_ptr + request)
    return first, tl.load(starts_ptr + request + 1) - first


@triton.jit
def asked_queries(
    starts_ptr, request, head, rows, stride_token, stride_h, HEADS: tl.constexpr, ASKED: tl.constexpr
):
    """Where the queries lie by which a KV head's pages are chosen: elements into ``q``, int64 like ``rows``.

    Row ``token * HEADS + h`` is of query head h of the KV head, and of one of the ``ASKED`` tokens.
    """
    first, count = span_of(starts_ptr, request)
    token = first
    if ASKED > 1:
        token = first + (rows // HEADS * (count - 1) + (ASKED - 1) // 2) // (ASKED - 1)
    return token.to(tl.int64) * stride_token + (head * HEADS + rows % HEADS) * stride_h

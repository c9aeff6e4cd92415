"""The mean query of a request, by which its pages are scored."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import DecodePlan


def tokens_of(q: torch.Tensor, plan: DecodePlan, request: int, kv_heads: int) -> torch.Tensor:
    """float32 [tokens, kv_heads, group, head_dim]: the queries of a request."""
    first, count = plan.queries.spans(plan.table_seq_lens.shape[0])[request]
    return q[first : first + count].float().unflatten(1, (kv_heads, -1))


def mean_query(q: torch.Tensor, plan: DecodePlan, request: int, kv_heads: int) -> torch.Tensor:
    """float32 [kv_heads, group, head_dim]: their mean over the tokens."""
    return tokens_of(q, plan, request, kv_heads).mean(0)

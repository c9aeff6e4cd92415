"""The queries by which pages are chosen, for the references that score them."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import DecodePlan


def asked_queries(q: torch.Tensor, plan: DecodePlan, request: int, kv_heads: int) -> torch.Tensor:
    """float32 [kv_heads, asked * group, head_dim], the tokens of a request that are asked one after the other."""
    first, count = plan.queries.spans(plan.table_seq_lens.shape[0])[request]
    tokens = q[plan.queries.asked_of(first, count)].float()
    return tokens.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)

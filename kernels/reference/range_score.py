"""Reference of :mod:`vllm_sparse.kernels.range_score`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.page_write import key_range
from vllm_sparse.kernels.reference.query_tokens import tokens_of
from vllm_sparse.kernels.reference.store_scores import scored_requests, store_scores
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores


def range_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    slack: float = 1.0,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    for request, blocks, offset, seq_len in scored_requests(block_table, plan, page_size):
        summaries = kv[:, :, page_size:][blocks]
        centre, half = (x.permute(1, 2, 0) for x in key_range(summaries, 0))
        tokens = tokens_of(q, plan, request, kv.shape[1]) * scale
        bound = tokens.mean(0) @ centre + slack * (tokens.abs().mean(0) @ half)
        bound[..., seq_len // page_size :] = float("-inf")
        store_scores(scores, request, offset, bound.flatten(0, 1))

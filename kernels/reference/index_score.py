"""References of the launchers of :mod:`vllm_sparse.kernels.index_score`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.hash_uniform import hash_uniform
from vllm_sparse.kernels.reference.store_scores import scored_requests, store_scores
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_scores import PageScores


def recency_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    for request, blocks, offset, _ in scored_requests(block_table, plan, page_size):
        recency = torch.arange(len(blocks), dtype=torch.float32, device=blocks.device)
        store_scores(scores, request, offset, recency.expand(scores.q_heads, -1))


def random_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    for request, blocks, offset, seq_len in scored_requests(block_table, plan, page_size):
        head = torch.arange(scores.q_heads, device=blocks.device)[:, None]
        page = torch.arange(len(blocks), device=blocks.device)
        store_scores(scores, request, offset, hash_uniform(seq_len, head, page))

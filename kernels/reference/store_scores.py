"""Rows to be scored, and their scores in a PageScores, for the references that score pages."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores


def scored_requests(block_table: torch.Tensor, plan: DecodePlan, page_size: int):
    """Yield (request, its block ids, first column in the scores, context tokens) of scored rows."""
    offsets = plan.score_offsets.tolist()
    for request, seq_len in enumerate(plan.table_seq_lens.tolist()):
        if seq_len and offsets[request] >= 0:
            blocks = block_table[request, : -(-seq_len // page_size)].long()
            yield request, blocks, offsets[request], seq_len


def store_masses(
    scores: PageScores, request: int, offset: int, logits: torch.Tensor, seq_len: int, page_size: int
) -> None:
    """The log-mass of each page from ``logits`` [kv_heads, group, tokens], a whole number of pages."""
    logits[..., seq_len:] = float("-inf")
    mass = logits.unflatten(-1, (-1, page_size)).logsumexp(-1)
    store_scores(scores, request, offset, mass.flatten(0, 1))


def store_scores(scores: PageScores, request: int, offset: int, values: torch.Tensor) -> None:
    """``values`` [q_heads, pages] of one request and their log-sum-exp by chunks."""
    scores.values[:, offset : offset + values.shape[1]] = values
    first = offset // CHUNK_PAGES + request
    for chunk, part in enumerate(values.split(CHUNK_PAGES, dim=1)):
        scores.chunk_lse[:, first + chunk] = part.logsumexp(1)

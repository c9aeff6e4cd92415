"""Reference of :mod:`vllm_sparse.kernels.page_mass`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.logits import capped
from vllm_sparse.kernels.reference.query_tokens import mean_query
from vllm_sparse.kernels.reference.store_scores import scored_requests, store_masses
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores


def page_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    for request, blocks, offset, seq_len in scored_requests(block_table, plan, page_size):
        keys = kv[blocks, :, :page_size, : q.shape[-1]].float().transpose(0, 1).flatten(1, 2)
        heads = mean_query(q, plan, request, kv.shape[1]) * scale
        logits = capped(heads @ keys.transpose(1, 2), geometry)
        store_masses(scores, request, offset, logits, seq_len, page_size)

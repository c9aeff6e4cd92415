"""Reference of :mod:`vllm_sparse.kernels.sketch_score`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.hadamard import hadamard
from vllm_sparse.kernels.reference.query_tokens import mean_query
from vllm_sparse.kernels.reference.sketch_write import sketched_keys
from vllm_sparse.kernels.reference.store_scores import scored_requests, store_masses
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.summaries import TILE_TOKENS, SketchLayout


def sketch_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    summary: str,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    requests = list(scored_requests(block_table, plan, page_size))
    if not requests:
        return
    # Requests share pages: each is decoded once.
    layout = SketchLayout.of(summary, q.shape[-1])
    used, places = torch.unique(torch.cat([blocks for _, blocks, _, _ in requests]), return_inverse=True)
    decoded, scales = (x.transpose(0, 1) for x in sketched_keys(kv[used], page_size, summary))
    of_requests = places.split([len(blocks) for _, blocks, _, _ in requests])
    for (request, _, offset, seq_len), blocks in zip(requests, of_requests, strict=True):
        keys = decoded[:, blocks]
        query = mean_query(q, plan, request, kv.shape[1])
        heads = hadamard(torch.nn.functional.pad(query, (0, keys.shape[-1] - q.shape[-1]))) * scale
        logits = heads @ keys.flatten(1, 2).transpose(1, 2)
        lost = layout.noise * scales[:, blocks].flatten(1).square()[:, None]
        logits += lost * heads.square().sum(-1, keepdim=True) / 2
        # Tiles that the request has not filled have no sketch.
        store_masses(scores, request, offset, logits, seq_len // TILE_TOKENS * TILE_TOKENS, page_size)

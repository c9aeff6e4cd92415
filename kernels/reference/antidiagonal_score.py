"""Reference of :mod:`vllm_sparse.kernels.antidiagonal_score`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.query_blocks import context_keys
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks


def antidiagonal_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    scores: torch.Tensor,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    stride, q_heads = 16, q.shape[1]
    keys = context_keys(kv, block_table, blocks, page_size).flatten(1, 2)
    columns = keys.unflatten(1, (-1, stride)).flatten(2).repeat_interleave(q_heads // kv.shape[1], 0)
    out = scores.view(q_heads, blocks.num_blocks, -1)
    for block, part in enumerate(blocks.split(1)):
        query = q[block * BLOCK_TOKENS :][: part.num_tokens].float()
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, -part.num_tokens % stride))
        rows = query.transpose(0, 1).unflatten(1, (-1, stride)).flip(2).flatten(2)
        logits = rows @ columns.transpose(1, 2) * (scale / stride)
        row = torch.arange(logits.shape[1], device=q.device)
        last = part.first_position + ((row + 1) * stride).clamp(max=part.num_tokens) - 1
        unseen = torch.arange(logits.shape[2], device=q.device) * stride > last[:, None]
        weights = logits.masked_fill(unseen, float("-inf")).softmax(-1)
        mass = weights.unflatten(2, (scores.shape[1], -1)).sum((1, 3))
        out[:, block] = mass.clamp(min=1e-30).log()

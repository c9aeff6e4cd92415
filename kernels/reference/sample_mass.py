"""Reference of :mod:`vllm_sparse.kernels.sample_mass`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.logits import capped, softmax
from vllm_sparse.kernels.reference.query_blocks import context_keys
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.pages.sample import SAMPLE_BLOCKS, SAMPLE_EVERY, STRETCH_TOKENS


def sample_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    tops: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    page_size, group = geometry.page_size, geometry.q_heads // geometry.kv_heads
    keys = context_keys(kv, block_table, blocks, page_size).flatten(1, 2)
    sinks = None
    if geometry.sink_logits is not None:
        sinks = geometry.sink_logits.float().view(-1, group, 1)
    rows = scores.view(-1, blocks.num_blocks, scores.shape[1])
    for first, pair in enumerate(blocks.split(SAMPLE_BLOCKS)):
        asked = torch.arange(0, pair.num_tokens, SAMPLE_EVERY, device=q.device)
        asked = (asked + SAMPLE_EVERY).clamp(max=pair.num_tokens) - 1
        query = q[first * SAMPLE_BLOCKS * BLOCK_TOKENS + asked].float().transpose(0, 1).unflatten(0, (-1, group))
        count = pair.num_pages(page_size)
        logits = query @ keys[:, None, : count * page_size].transpose(2, 3) * geometry.scale
        unseen = torch.arange(count * page_size, device=q.device) > (pair.first_position + asked)[:, None]
        logits = capped(logits, geometry).masked_fill(unseen, float("-inf"))
        stretches = logits.unflatten(3, (-1, STRETCH_TOKENS)).amax(4)
        mass = softmax(stretches, sinks).sum(2).flatten(0, 1).unflatten(1, (count, -1)).sum(2)
        for block, part in enumerate(pair.split(1), first * SAMPLE_BLOCKS):
            seen = part.num_pages(page_size)
            rows[:, block, :seen] = mass[:, :seen].clamp(min=1e-30).log()

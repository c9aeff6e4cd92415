"""Reference of :mod:`vllm_sparse.kernels.probe_mass`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.probe import PROBE_TOKENS, probe_groups, probe_page, probe_start
from vllm_sparse.pages.query_blocks import QueryBlocks


def probe_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    chunk: QueryBlocks,
    geometry: Geometry,
    part_lse: torch.Tensor,
    parts: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    q_heads, head_dim = q.shape[1:]
    kv_heads = kv.shape[1]
    start, end, pages = probe_start(chunk, page_size), chunk.end_position, chunk.num_pages(page_size)
    assert start >= 0, f"an estimate needs {PROBE_TOKENS} tokens of context, not {end}"
    positions = torch.arange(max(start, chunk.first_position), end, device=q.device)
    keys = kv[block_table[:pages].long(), :, :page_size, :head_dim].transpose(0, 1).flatten(1, 2)[:, :end].float()
    query = q[positions - chunk.first_position].float().view(-1, kv_heads, q_heads // kv_heads, head_dim)
    logits = torch.einsum("qhgd,hkd->hgqk", query, keys).flatten(0, 1) * scale
    behind = positions[:, None] - torch.arange(end, device=q.device)
    weights = logits.masked_fill(behind < 0, float("-inf")).softmax(-1)
    weights = torch.nn.functional.pad(weights, (0, pages * page_size - end))
    behind = positions[:, None] - torch.arange(pages * page_size, device=q.device)
    page = torch.arange(pages, device=q.device)
    for k in range(probe_groups(page_size) + 1):
        band = (probe_page(chunk, page_size) - 1 + k - page).repeat_interleave(page_size)
        inside = behind.div(page_size, rounding_mode="floor") == band
        mass[:, k] = (weights * inside).sum(1).unflatten(-1, (pages, page_size)).sum(-1)

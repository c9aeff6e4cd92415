"""Attention over every page, which the CPU's dense backend runs; there is no kernel of this name."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.logits import capped, softmax
from vllm_sparse.pages.geometry import Geometry


def dense_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    geometry: Geometry,
    out: torch.Tensor,
) -> None:
    """Causal attention over every page, for queries of any length; the CPU's dense backend.

    q, out: [num_tokens, q_heads, head_dim]; query_start_loc: int32 [num_reqs + 1];
    seq_lens: int32 [num_reqs], context tokens with this step's queries at their end.
    """
    head_dim, group, page_size = q.shape[-1], q.shape[1] // kv.shape[1], geometry.page_size
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[request], starts[request + 1]
        if start == end or seq_len == 0:
            continue
        blocks = block_table[request, : -(-seq_len // page_size)].long()
        context = kv[blocks, :, :page_size].transpose(0, 1).flatten(1, 2)[:, :seq_len].to(q.dtype)
        k, v = (x.repeat_interleave(group, 0) for x in context.split(head_dim, -1))
        query = q[start:end].transpose(0, 1)
        mask = None
        if end - start > 1:
            positions = torch.arange(seq_len - (end - start), seq_len, device=q.device)
            later = positions[:, None] < torch.arange(seq_len, device=q.device)
            mask = torch.zeros(later.shape, dtype=q.dtype, device=q.device)
            mask.masked_fill_(later, float("-inf"))
        if not geometry.plain:
            logits = capped(query @ k.transpose(1, 2) * geometry.scale, geometry)
            sinks = None if geometry.sink_logits is None else geometry.sink_logits[:, None]
            result = softmax(logits if mask is None else logits + mask, sinks) @ v
            out[start:end] = (result * geometry.v_scale).transpose(0, 1).to(out.dtype)
            continue
        # With a batch dimension and an additive mask torch takes its fused kernel: 4 times faster.
        result = torch.nn.functional.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=mask, scale=geometry.scale
        )[0]
        out[start:end] = (result * geometry.v_scale).transpose(0, 1).to(out.dtype)

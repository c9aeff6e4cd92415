"""Reference of :mod:`vllm_sparse.kernels.sparse_prefill`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.logits import capped, softmax
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import single_head_pages
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    table: PageTable,
    geometry: Geometry,
    out: torch.Tensor,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    num_tokens = q.shape[0]
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    keys, values = single_head_pages(kv, page_size)
    for row, length in enumerate(table.lengths.tolist()):
        if length == 0:
            continue
        head, block = divmod(row, num_blocks)
        tokens = slice(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, num_tokens))
        head_pages = table.head_pages[row, : -(-length // page_size)].long()
        k, v = (x[head_pages].flatten(0, 2)[:length].to(_wide(q)) for x in (keys, values))
        query = q[tokens, head].to(_wide(q))
        seen = length - torch.arange(len(query) - 1, -1, -1, device=q.device)
        hidden = torch.arange(length, device=q.device) >= seen[:, None]
        logits = capped(query @ k.T * scale, geometry).masked_fill(hidden, float("-inf"))
        sink = None if geometry.sink_logits is None else geometry.sink_logits[head]
        weights = softmax(logits, sink)
        out[tokens, head] = (weights @ v * geometry.v_scale).to(out.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

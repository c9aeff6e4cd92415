"""Reference of :mod:`vllm_sparse.kernels.sparse_decode`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import kept
from vllm_sparse.kernels.reference.logits import capped, softmax
from vllm_sparse.pages.decode_plan import WHOLE
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid, single_head_pages
from vllm_sparse.pages.page_table import PageTable


def sparse_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    table: PageTable,
    geometry: Geometry,
    out: torch.Tensor,
    host: torch.Tensor | None = None,
    exponents: torch.Tensor | None = None,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    kv_heads, group = kv.shape[1], q.shape[1] // kv.shape[1]
    spans = table.queries.spans(len(table.lengths) // kv_heads)
    keys, values = single_head_pages(kv, page_size)
    for row, length in enumerate(table.lengths.tolist()):
        if length == 0:
            continue
        request, head = divmod(row, kv_heads)
        num_pages = -(-length // page_size)
        if table.routes is not None and table.routes[request] == WHOLE:
            head_pages = HeadPageGrid.of(kv if host is None else host).head_pages(
                table.block_table[request, :num_pages], head
            )
            head_pages = head_pages if host is None else ~head_pages
        else:
            head_pages = table.head_pages[row, :num_pages].long()
        k, v = (x[head_pages.clamp(min=0)] for x in (keys, values))
        if host is not None:
            away, by_head_page = head_pages < 0, None if exponents is None else exponents.flatten(0, 1)
            found = kept(host.flatten(0, 1), by_head_page, ~head_pages[away], kv.dtype)
            k[away], v[away] = found[:, :page_size, None].chunk(2, -1)
        k, v = (x.flatten(0, 2)[:length].float() for x in (k, v))
        first, count = spans[request]
        tokens, heads = slice(first, first + count), slice(head * group, (head + 1) * group)
        logits = q[tokens, heads].float() @ k.T * scale
        later = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(length - count + 1)
        logits = capped(logits, geometry).masked_fill(later[:, None], float("-inf"))
        sinks = None if geometry.sink_logits is None else geometry.sink_logits[heads]
        weights = softmax(logits, sinks)
        out[tokens, heads] = (weights @ v * geometry.v_scale).to(out.dtype)

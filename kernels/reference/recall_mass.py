"""Reference of :mod:`vllm_sparse.kernels.recall_mass`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.logits import capped
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid, single_head_pages
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.recall_sums import RecallSums


def recall_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    table: PageTable,
    geometry: Geometry,
    monitor: RecallSums,
    layer: int,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    step, scored = int(monitor.step), int(plan.totals[0])
    if step % monitor.every or not scored:
        return
    head_dim, kv_heads = q.shape[-1], kv.shape[1]
    request, seq_len = plan.work[step // monitor.every % scored, :2].tolist()
    first, count = plan.queries.spans(len(block_table))[request]
    pages, grid = block_table[request, : -(-seq_len // page_size)], HeadPageGrid.of(kv)
    keys, _ = single_head_pages(kv, page_size)
    for head, query in enumerate(q[first + count - 1].float().view(kv_heads, -1, head_dim)):
        row = request * kv_heads + head
        length = int(table.lengths[row])
        chosen = table.head_pages[row, : -(-length // page_size)].long()
        some, everything = (
            capped(query @ keys[head_pages].flatten(0, 2)[:tokens].float().T * scale, geometry).logsumexp(-1)
            for head_pages, tokens in ((chosen, length), (grid.head_pages(pages, head), seq_len))
        )
        if geometry.sink_logits is not None:
            sinks = geometry.sink_logits.float().view(kv_heads, -1)[head]
            some, everything = (torch.logaddexp(mass, sinks) for mass in (some, everything))
        monitor.sums[layer, head, 0] += (some - everything).exp().mean().double()
        monitor.sums[layer, head, 1] += 1

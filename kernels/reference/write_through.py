"""Reference of :mod:`vllm_sparse.kernels.write_through`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import to_e4m3
from vllm_sparse.kernels.reference.stage_pages import staged_pages
from vllm_sparse.pages.hot_set import HotSet
from vllm_sparse.pages.write_plan import WritePlan


def write_through(
    hot: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    host: torch.Tensor,
    summaries: torch.Tensor,
    hot_set: HotSet,
    exponents: torch.Tensor | None = None,
) -> None:
    heads, page_size = host.shape[1], host.shape[2]
    for page, block, first, end in staged_pages(plan):
        if exponents is None:
            host[block, :, first:end] = hot[page, :, first:end]
        else:
            host[block, :, :end], exponents[block] = to_e4m3(hot[page, :, :end])
        summaries[block] = hot[page, :, page_size:]
        head_pages = slice(block * heads, (block + 1) * heads)
        slots = hot_set.slot_of[head_pages].long()
        slots = slots[slots >= 0]
        hot_set.slot_head_page[slots] = -1
        hot_set.last_use[slots] = 0
        hot_set.slot_of[head_pages] = -1

"""Reference of :mod:`vllm_sparse.kernels.select_pages`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import WHOLE, DecodePlan
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection


def select_pages(
    scores: PageScores,
    block_table: torch.Tensor,
    plan: DecodePlan,
    kv: torch.Tensor,
    selection: Selection,
    table: PageTable,
) -> None:
    page_size, window_tokens, top_p = selection.page_size, selection.window_tokens, selection.top_p
    kv_heads = kv.shape[1]
    group = scores.q_heads // kv_heads
    heads = torch.arange(kv_heads, device=kv.device)[:, None]
    for request, seq_len in enumerate(plan.table_seq_lens.tolist()):
        if seq_len == 0:
            continue
        pages = -(-seq_len // page_size)
        offset = int(plan.score_offsets[request])
        if offset == WHOLE:
            continue
        if offset < 0:
            chosen = torch.arange(pages, device=kv.device).expand(kv_heads, pages)
        else:
            budget = int(plan.budgets[request]) or selection.budget_pages
            mass = scores.values[:, offset : offset + pages].softmax(-1)
            mass = mass.unflatten(0, (kv_heads, group)).sum(1)
            forced = torch.zeros_like(mass, dtype=torch.bool)
            forced[:, : selection.sink_pages] = True
            forced[:, max(0, min(seq_len - window_tokens, seq_len - 1)) // page_size :] = True
            order = mass.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True).indices
            chosen = order[:, : selection.most_pages_of(budget)].sort(dim=-1).values
            if top_p:
                _stop_at_top_p(mass, forced, chosen, top_p * group, request, seq_len, page_size, table)
            if selection.head_budget_pages is not None:
                for head, pages_of_head in enumerate(selection.head_budget_pages.tolist()):
                    count = selection.share_of(pages_of_head, budget)
                    chosen[head, :count] = order[head, :count].sort().values
                    table.lengths[request * kv_heads + head] = seq_len - (pages - count) * page_size
        rows = slice(request * kv_heads, (request + 1) * kv_heads)
        head_pages = HeadPageGrid.of(kv).head_pages(block_table[request, chosen], heads)
        table.head_pages[rows, : chosen.shape[1]] = head_pages.int()


def _stop_at_top_p(mass, forced, chosen, target, request, seq_len, page_size, table) -> None:
    """Of ``chosen`` [kv_heads, budget] move those to the front that reach ``target``, and write their lengths."""
    pages = mass.shape[1]
    for head, row in enumerate(chosen):
        held, must = mass[head, row], forced[head, row]
        levels = held[~must].sort(descending=True).values
        reached = held[must].sum() + levels.cumsum(0) >= target
        least = levels[reached][0] if reached.any() else 0.0
        keep = must | ((held >= least) & (held[must].sum() < target))
        row[: keep.sum()] = row[keep]
        table.lengths[request * len(chosen) + head] = seq_len - (pages - int(keep.sum())) * page_size

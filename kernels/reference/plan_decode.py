"""Reference of :mod:`vllm_sparse.kernels.plan_decode`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.decode_plan import COUNTERS, EVERY_PAGE, EXACT, NOT_LISTED, PROMPT, WHOLE, DecodePlan
from vllm_sparse.pages.page_scores import CHUNK_PAGES
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection


def plan_decode(
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    table: PageTable,
    selection: Selection,
    min_context_tokens: int,
    capacity_pages: int,
    short_rows_dense: bool,
) -> None:
    page_size = selection.page_size
    lens = seq_lens.long()
    pages = -(-lens // page_size)
    whole, prompt = plan.budgets < 0, plan.budgets == PROMPT
    budget = torch.where(plan.budgets > 0, plan.budgets, selection.budget_pages).long()
    largest = budget.new_tensor([selection.most_pages_of(pages) for pages in budget.tolist()])
    scored = wanted = ~whole & (lens > min_context_tokens) & (pages > largest)
    offsets = torch.cumsum(torch.where(scored, pages, 0), 0) - torch.where(scored, pages, 0)
    fits = offsets + pages <= capacity_pages
    dense = torch.where(scored, ~fits, torch.full_like(scored, short_rows_dense))
    scored = wanted & fits
    plan.table_seq_lens.copy_(torch.where(dense, 0, lens))
    plan.dense_seq_lens.copy_(torch.where(dense, lens, 0))
    plan.score_offsets.copy_(torch.where(scored, offsets, torch.where(whole, WHOLE, EVERY_PAGE)))
    attended = torch.where(scored, lens - (pages - budget) * page_size, lens)
    if len(lens):
        kv_heads = table.lengths.shape[0] // len(lens)
        table.lengths.copy_(torch.where(dense, 0, attended).repeat_interleave(kv_heads))
    short = ~dense & ~scored & (lens > 0)
    rows = torch.cat([scored.nonzero(), short.nonzero()]).squeeze(1)
    chunks = -(-pages[scored] // CHUNK_PAGES)
    ranked = (
        torch.minimum(lens - selection.window_tokens, lens - 1).clamp(min=0) // page_size - selection.sink_pages
    )[scored]
    segments = torch.where(ranked <= plan.alone_pages, 1, -(-ranked // plan.segment_pages))
    segments = torch.cat([segments, torch.ones_like(lens[short])])
    plan.work[: len(rows), :3] = torch.stack([rows, lens[rows], plan.score_offsets[rows]], 1).int()
    plan.work[:, 3:] = NOT_LISTED
    plan.work[: len(chunks), 3] = chunks.cumsum(0).int()
    plan.work[: len(rows), 4] = segments.cumsum(0).int()
    plan.totals.copy_(torch.stack([scored.sum(), (scored | short).sum(), chunks.sum(), segments.sum()]))
    counts = torch.tensor([count for _, count in plan.queries.spans(len(lens))], device=lens.device)
    counts = torch.where(prompt, 0, counts).minimum(lens)
    later = counts * (counts - 1) // 2  # of each token those that come after it are not its context
    counted, below = counts > 0, lens <= min_context_tokens
    numbers = {
        "attended_tokens": (counts * attended - later).sum(),
        "context_tokens": (counts * lens - later).sum(),
        "rows": counted.sum(),
        "sparse_rows": scored.sum(),
        "short_rows": (counted & below).sum(),
        "covered_rows": (counted & ~below & ~wanted & ~whole).sum(),
        "exact_rows": (counted & ~below & (plan.budgets == EXACT)).sum(),
        "steps": counted.any(),
        "sparse_steps": scored.any(),
    }
    plan.counters += torch.stack([numbers[name].long() for name in COUNTERS])

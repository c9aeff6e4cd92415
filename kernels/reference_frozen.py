"""Plain-torch twins of what lists pages and of what scores by lists, same names and signatures as those."""

from __future__ import annotations

import torch
from vllm_sparse.kernels.reference_scores import store_scores

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.page_scores import PageScores
from vllm_sparse.query_blocks import QueryBlocks
from vllm_sparse.summaries import FROZEN_HEADER, list_capacity

RANK_STEP, PAST_BUDGET = 2.0**-10, 32.0


def list_pages(
    mass: torch.Tensor | None,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    sink_pages: int,
    window_tokens: int,
    budget_pages: int,
    least_pages: int,
    most_pages: int,
) -> None:
    kv_heads, pages, device = kv.shape[1], chunk.num_pages(page_size), kv.device
    listed = list_capacity(kv.shape[3] // 2, kv.element_size())
    held = torch.full((kv_heads, max(pages, listed)), -1.0, dtype=torch.float32, device=device)
    held[:, :pages] = 0 if mass is None else mass.reshape(kv_heads, -1, pages).sum(1)
    window_page = max(0, chunk.end_position - max(1, window_tokens)) // page_size
    held[:, window_page:pages] = 1e6 + torch.arange(pages - window_page, device=device)
    held[:, :sink_pages] = -1
    masses, order = held.topk(listed, dim=1)
    entry = torch.empty(kv_heads, FROZEN_HEADER + listed, dtype=torch.int32, device=device)
    entry[:, 0] = pages - 1
    entry[:, 1] = (masses >= 0).sum(1)
    entry[:, 2] = budget_pages
    entry[:, FROZEN_HEADER:] = order
    if most_pages > budget_pages:
        wanted = torch.nn.functional.pad(masses, (0, max(0, budget_pages - listed)), value=-1.0)
        # Where no pages are left to list, heads take as many alike.
        wanted = torch.where(wanted < 0, -1.0 - torch.arange(wanted.shape[1], device=device), wanted)
        wanted[:, :least_pages] = 1e9
        wanted = wanted[:, :most_pages]
        heads = wanted.flatten().topk(kv_heads * budget_pages).indices // wanted.shape[1]
        entry[:, 2] = (heads == torch.arange(kv_heads, device=device)[:, None]).sum(1)
    block = block_table[pages - 1 : pages].long()
    kv.view(torch.int16)[:, :, page_size][block] = entry.to(torch.int16)[None]


def frozen_score(
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    page_size: int,
    scores: PageScores,
    stop: bool = False,
) -> None:
    kv_heads = kv.shape[1]
    lists = kv.view(torch.int16)[:, :, page_size]
    offsets = plan.score_offsets.tolist()
    for request, seq_len in enumerate((plan.table_seq_lens + plan.dense_seq_lens).tolist()):
        if not seq_len:
            continue
        last, row = divmod(seq_len - 1, page_size)
        blocks = block_table[request, : last + 1].long()
        age = last - torch.arange(last + 1, device=kv.device)
        values = torch.empty(kv_heads, last + 1, dtype=torch.float32, device=kv.device)
        for head in range(kv_heads):
            headers = lists[blocks, head, 0].int() & 0xFFFF
            anchor = _anchor(headers, last if row else max(0, last - 1))
            if row == 0 and last > 0:
                lists[blocks[last], head, 0] = headers.new_tensor(anchor).to(torch.int16)
            if offsets[request] < 0:
                continue
            entry = lists[blocks[anchor], head].int() & 0xFFFF
            count, budget = entry[1:FROZEN_HEADER].tolist()
            recent = min(last - anchor, budget // 2)
            rank = torch.where(age < recent, age, count + age)
            listed = entry[FROZEN_HEADER : FROZEN_HEADER + count].long()
            rank[listed] = recent + torch.arange(count, device=kv.device)
            values[head] = -RANK_STEP * rank
            if stop:
                values[head, rank >= budget] -= PAST_BUDGET
        if offsets[request] >= 0:
            group = scores.q_heads // kv_heads
            store_scores(scores, request, offsets[request], values.repeat_interleave(group, 0))


def _anchor(headers: torch.Tensor, last: int) -> int:
    """The page up to ``last`` whose list counts, from what each page's header says."""
    hint = int(headers[last])
    if hint == 0 or (hint <= last and int(headers[hint]) == hint):
        return hint
    lists = torch.nonzero(headers[: last + 1] == torch.arange(last + 1, device=headers.device))
    return int(lists[-1]) if len(lists) else 0

"""Plain-torch references of every kernel launcher, same names and signatures.

They run the CPU backend and are what GPU kernels are tested against, so they favour plain code
over speed. Tensors are described in :mod:`vllm_sparse.pages.page_table` and
:mod:`vllm_sparse.pages.decode_plan`.
"""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference_offload import (  # noqa: F401
    fetch_head_pages,
    find_hot_slots,
    kept,
    plan_writes,
    read_pages,
    stage_pages,
    write_through,
)
from vllm_sparse.kernels.reference_prefill import (  # noqa: F401
    antidiagonal_score,
    hash_uniform,
    pattern_distance,
    pooled_score,
    position_pattern,
    prefill_table,
    probe_mass,
    select_bands,
    select_row_pages,
    sparse_prefill,
    vertical_slash,
)
from vllm_sparse.kernels.reference_scores import scored_requests, store_masses, store_scores
from vllm_sparse.kernels.reference_sketch import hadamard, sketched_keys, write_sketches
from vllm_sparse.pages.decode_plan import EVERY_PAGE, NOT_LISTED, WHOLE, DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid, single_head_pages
from vllm_sparse.pages.page_scores import CHUNK_PAGES, PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.recall_sums import RecallSums
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import SKETCH_BITS, TILE_TOKENS, SketchLayout

SCALE_BITS, SCALE_LEVELS, SMALLEST_SCALE = 16, 125.9, 1e-7


def page_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    summary: str,
) -> None:
    slots = slot_mapping.long()
    written = slots >= 0
    if not written.any():
        return
    tokens, slots = torch.nonzero(written).squeeze(1), slots[written]
    blocks, rows = slots // page_size, slots % page_size
    kv[blocks, :, rows] = torch.cat([key[tokens], value[tokens]], dim=-1).to(kv.dtype)
    if summary in SKETCH_BITS:
        write_sketches(kv, slots, page_size, summary)
    if summary != "key_range":
        return
    head_dim = key.shape[-1]
    touched, inverse = torch.unique(blocks, return_inverse=True)
    filled = torch.zeros_like(touched).scatter_reduce_(0, inverse, rows + 1, "amax", include_self=True)
    keys = kv[touched, :, :page_size, :head_dim].float()
    outside = torch.arange(page_size, device=kv.device) >= filled[:, None]
    outside = outside[:, None, :, None]
    low, high = keys.masked_fill(outside, float("inf")).amin(2), keys.masked_fill(outside, float("-inf")).amax(2)
    x, c_scale, bits = _steps(low + (high - low) * 0.5)
    c = torch.floor(x + 0.5)
    c[..., :SCALE_BITS] = 2 * torch.floor((x[..., :SCALE_BITS] - bits) * 0.5 + 0.5) + bits
    x, _, bits = _steps(torch.maximum(high - c * c_scale, c * c_scale - low))
    w = x.ceil()
    w[..., :SCALE_BITS] = 2 * torch.ceil((x[..., :SCALE_BITS] - bits) * 0.5) + bits
    row = kv[touched, :, page_size]
    row.view(torch.int8)[..., : 2 * head_dim] = torch.cat([c, w], -1).to(torch.int8)
    kv[touched, :, page_size] = row


def _steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``values`` [..., head_dim] in steps of a bfloat16 scale, that scale, and its bits from the lowest."""
    scale = (values.abs().amax(-1, keepdim=True) / SCALE_LEVELS).clamp(min=SMALLEST_SCALE)
    number = (scale.view(torch.int32) >> 16) + 1
    bits = (number >> torch.arange(SCALE_BITS, device=values.device)) & 1
    scale = (number << 16).view(torch.float32)
    return values / scale, scale, bits.float()


def key_range(kv: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and half width of the keys of each page of ``kv``, float32 [num_blocks, kv_heads, head_dim]."""
    head_dim = kv.shape[-1] // 2
    row = kv[:, :, page_size].contiguous().view(torch.int8)[..., : 2 * head_dim].unflatten(-1, (2, head_dim))
    places = torch.arange(SCALE_BITS, device=kv.device)
    number = ((row[..., :SCALE_BITS].int() & 1) << places).sum(-1, keepdim=True, dtype=torch.int32)
    return (row.float() * (number << 16).view(torch.float32)).unbind(-2)


def plan_decode(
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    table: PageTable,
    selection: Selection,
    min_context_tokens: int,
    capacity_pages: int,
    short_rows_dense: bool,
) -> None:
    page_size, budget_pages = selection.page_size, selection.budget_pages
    lens = seq_lens.long()
    pages = -(-lens // page_size)
    prompt = plan.whole.bool()
    scored = ~prompt & (lens > min_context_tokens) & (pages > selection.most_pages)
    offsets = torch.cumsum(torch.where(scored, pages, 0), 0) - torch.where(scored, pages, 0)
    fits = offsets + pages <= capacity_pages
    dense = torch.where(scored, ~fits, torch.full_like(scored, short_rows_dense))
    scored &= fits
    plan.table_seq_lens.copy_(torch.where(dense, 0, lens))
    plan.dense_seq_lens.copy_(torch.where(dense, lens, 0))
    plan.score_offsets.copy_(torch.where(scored, offsets, torch.where(prompt, WHOLE, EVERY_PAGE)))
    attended = torch.where(scored, lens - (pages - budget_pages) * page_size, lens)
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
    plan.counters += torch.stack([attended[~prompt].sum(), lens[~prompt].sum()])


def range_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    slack: float = 1.0,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    head_dim, group = q.shape[-1], q.shape[1] // kv.shape[1]
    for request, blocks, offset, _ in scored_requests(block_table, plan, page_size):
        summaries = kv[:, :, page_size:][blocks]
        centre, half = (x.permute(1, 2, 0) for x in key_range(summaries, 0))
        heads = q[request].float().view(-1, group, head_dim) * scale
        bound = heads @ centre + slack * (heads.abs() @ half)
        store_scores(scores, request, offset, bound.flatten(0, 1))


def sketch_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
    summary: str,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    group, requests = q.shape[1] // kv.shape[1], list(scored_requests(block_table, plan, page_size))
    if not requests:
        return
    # Requests share pages: each is decoded once.
    layout = SketchLayout.of(summary, q.shape[-1])
    used, places = torch.unique(torch.cat([blocks for _, blocks, _, _ in requests]), return_inverse=True)
    decoded, scales = (x.transpose(0, 1) for x in sketched_keys(kv[used], page_size, summary))
    of_requests = places.split([len(blocks) for _, blocks, _, _ in requests])
    for (request, _, offset, seq_len), blocks in zip(requests, of_requests, strict=True):
        keys = decoded[:, blocks]
        query = torch.nn.functional.pad(q[request].float(), (0, keys.shape[-1] - q.shape[-1]))
        heads = hadamard(query).view(-1, group, keys.shape[-1]) * scale
        logits = heads @ keys.flatten(1, 2).transpose(1, 2)
        lost = layout.noise * scales[:, blocks].flatten(1).square()[:, None]
        logits += lost * heads.square().sum(-1, keepdim=True) / 2
        # Keys that a tile still lacks have a scale of 0: they count as its mean.
        store_masses(scores, request, offset, logits, -(-seq_len // TILE_TOKENS) * TILE_TOKENS, page_size)


def page_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    geometry: Geometry,
    scores: PageScores,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    head_dim, group = q.shape[-1], q.shape[1] // kv.shape[1]
    for request, blocks, offset, seq_len in scored_requests(block_table, plan, page_size):
        keys = kv[blocks, :, :page_size, :head_dim].float().transpose(0, 1).flatten(1, 2)
        heads = q[request].float().view(-1, group, head_dim) * scale
        store_masses(scores, request, offset, heads @ keys.transpose(1, 2), seq_len, page_size)


def recency_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    for request, blocks, offset, _ in scored_requests(block_table, plan, page_size):
        recency = torch.arange(len(blocks), dtype=torch.float32, device=blocks.device)
        store_scores(scores, request, offset, recency.expand(scores.q_heads, -1))


def random_score(block_table: torch.Tensor, plan: DecodePlan, page_size: int, scores: PageScores) -> None:
    for request, blocks, offset, seq_len in scored_requests(block_table, plan, page_size):
        head = torch.arange(scores.q_heads, device=blocks.device)[:, None]
        page = torch.arange(len(blocks), device=blocks.device)
        store_scores(scores, request, offset, hash_uniform(seq_len, head, page))


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
            mass = scores.values[:, offset : offset + pages].softmax(-1)
            mass = mass.unflatten(0, (kv_heads, group)).sum(1)
            forced = torch.zeros_like(mass, dtype=torch.bool)
            forced[:, : selection.sink_pages] = True
            forced[:, max(0, min(seq_len - window_tokens, seq_len - 1)) // page_size :] = True
            order = mass.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True).indices
            chosen = order[:, : selection.most_pages].sort(dim=-1).values
            if top_p:
                _stop_at_top_p(mass, forced, chosen, top_p * group, request, seq_len, page_size, table)
            if selection.head_budget_pages is not None:
                for head, count in enumerate(selection.head_budget_pages.tolist()):
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
        span = slice(head * group, (head + 1) * group)
        weights = (q[request, span].float() @ k.T * scale).softmax(-1)
        out[request, span] = (weights @ v).to(out.dtype)


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
    pages, grid = block_table[request, : -(-seq_len // page_size)], HeadPageGrid.of(kv)
    keys, _ = single_head_pages(kv, page_size)
    for head, query in enumerate(q[request].float().view(kv_heads, -1, head_dim)):
        row = request * kv_heads + head
        length = int(table.lengths[row])
        chosen = table.head_pages[row, : -(-length // page_size)].long()
        some, everything = (
            (query @ keys[head_pages].flatten(0, 2)[:tokens].float().T * scale).logsumexp(-1)
            for head_pages, tokens in ((chosen, length), (grid.head_pages(pages, head), seq_len))
        )
        monitor.sums[layer, head, 0] += (some - everything).exp().mean().double()
        monitor.sums[layer, head, 1] += 1


def dense_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention over every page, for queries of any length; the CPU's dense backend.

    q, out: [num_tokens, q_heads, head_dim]; query_start_loc: int32 [num_reqs + 1];
    seq_lens: int32 [num_reqs], context tokens with this step's queries at their end.
    """
    head_dim, group = q.shape[-1], q.shape[1] // kv.shape[1]
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[request], starts[request + 1]
        if start == end or seq_len == 0:
            continue
        blocks = block_table[request, : -(-seq_len // page_size)].long()
        context = kv[blocks, :, :page_size].transpose(0, 1).flatten(1, 2)[:, :seq_len]
        k, v = (x.repeat_interleave(group, 0) for x in context.split(head_dim, -1))
        query = q[start:end].transpose(0, 1)
        mask = None
        if end - start > 1:
            positions = torch.arange(seq_len - (end - start), seq_len, device=q.device)
            later = positions[:, None] < torch.arange(seq_len, device=q.device)
            mask = torch.zeros(later.shape, dtype=q.dtype, device=q.device)
            mask.masked_fill_(later, float("-inf"))
        # With a batch dimension and an additive mask torch takes its fused kernel: 4 times faster.
        result = torch.nn.functional.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=mask, scale=scale
        )[0]
        out[start:end] = result.transpose(0, 1).to(out.dtype)

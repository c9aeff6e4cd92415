"""Plain-torch references of the prefill launchers, same names and signatures; see :mod:`reference`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.layout import HeadPageGrid, single_head_pages
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.probe import (
    COVER_OCTAVES,
    COVER_ROUNDS,
    PROBE_TOKENS,
    band_shift,
    probe_groups,
    probe_page,
    probe_start,
)
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.pages.selection import Selection


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


def select_bands(
    mass: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    patterns: HeadPatterns,
    sink_pages: int,
    masses: torch.Tensor,
    page_keep: torch.Tensor,
    band_count: torch.Tensor,
) -> None:
    pages = chunk.num_pages(page_size)
    masses[:, :, :pages] = 0
    by_page, by_band = masses[:, :, :pages]
    page = torch.arange(pages, device=mass.device)
    counted = mass.masked_fill(page < sink_pages, 0)
    bands = [probe_page(chunk, page_size) - 1 + k - page for k in range(mass.shape[1])]
    for k, band in enumerate(bands):
        by_page += counted[:, k]
        exists = (band >= 0) & (band < pages)
        by_band[:, band[exists]] += counted[:, k, exists]
    top_p = patterns.top_p[:, None]
    wanted_pages, wanted_bands, recent_bands = patterns.sizes[:, :, None].masked_fill(top_p >= 1, pages)
    kept_pages, kept_bands = _largest(by_page, wanted_pages), _largest(by_band, wanted_bands)
    shared = (patterns.top_p > 0) & (patterns.top_p < 1)
    if shared.any():
        kept_pages[shared], kept_bands[shared] = _cover(
            counted[shared], bands, by_page[shared], by_band[shared], top_p[shared], band_shift(page_size)
        )
    page_keep[:, :pages] = kept_pages
    band_count[:, 0] = 0
    band_count[:, 1 : pages + 1] = (kept_bands | (page < recent_bands)).cumsum(1)


def _cover(counted, bands, by_page, by_band, top_p, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the pages and bands from a threshold on that together hold ``top_p`` [heads, 1] of the mass.

    Masses are compared as the integers of their bits, in which a factor of two is 2**23.
    """
    page_key, band_key = by_page.view(torch.int32), by_band.view(torch.int32) - shift
    high = torch.maximum(page_key.amax(1), band_key.amax(1)).clamp(min=1)[:, None] + 1
    low = (high - COVER_OCTAVES * 2**23).clamp(min=1)
    band = torch.stack(bands)
    exists = (band >= 0) & (band < by_page.shape[1])
    enough = top_p * by_page.sum(1, keepdim=True)
    for _ in range(COVER_ROUNDS):
        middle = low + (high - low) // 2
        diagonal = (band_key >= middle)[:, band.clamp(0, by_page.shape[1] - 1)] & exists
        held = (counted * (diagonal | (page_key >= middle)[:, None])).sum((1, 2))[:, None]
        low, high = torch.where(held >= enough, middle, low), torch.where(held >= enough, high, middle)
    return page_key >= low, band_key >= low


def _largest(masses: torch.Tensor, wanted: torch.Tensor | int) -> torch.Tensor:
    """Mask of the ``wanted`` (a number, or [rows, 1]) largest of each row, equal ones from the left."""
    rank = masses.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    everything = torch.as_tensor(wanted, device=masses.device) >= masses.shape[1]
    return ((rank < wanted) & (masses > 0)) | everything


def _fewest(masses: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the largest of each row that hold ``top_p`` of it, with all that equal the last of them."""
    if top_p >= 1:
        return torch.ones_like(masses, dtype=torch.bool)
    ordered = masses.sort(dim=1, descending=True).values
    short = ordered.cumsum(1) < top_p * ordered.sum(1, keepdim=True)
    last = short.sum(1, keepdim=True).clamp(max=masses.shape[1] - 1)
    return (masses >= ordered.gather(1, last)) & (masses > 0)


def vertical_slash(
    page_keep: torch.Tensor,
    band_count: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    keep: torch.Tensor,
) -> None:
    start, end = _block_spans(blocks, keep.device)
    page = torch.arange(keep.shape[1], device=keep.device)
    nearest = ((start + 1) // page_size - 1)[:, None] - page
    farthest = ((end - 1) // page_size)[:, None] - page
    seen = farthest >= 0
    slash = band_count[:, (farthest + 1).clamp(min=0)] > band_count[:, nearest.clamp(min=0)]
    kept = (slash | page_keep[:, None, : keep.shape[1]].bool()) & seen
    keep.copy_(kept.flatten(0, 1))


def position_pattern(pattern: PositionPattern, blocks: QueryBlocks, page_size: int, keep: torch.Tensor) -> None:
    start, end = (x[:, None] for x in _block_spans(blocks, keep.device))
    q_heads = keep.shape[0] // blocks.num_blocks
    page = torch.arange(keep.shape[1], device=keep.device)
    head = torch.arange(q_heads, device=keep.device)[:, None, None]
    last = (end - 1) // page_size
    nearest = (start - (page * page_size + page_size - 1)).clamp(min=0)
    farthest = end - 1 - page * page_size
    every = pattern.dilated_heads
    dilation = torch.where(head % every == every - 1, pattern.dilation, 1)
    chosen = (nearest < pattern.recent_tokens * dilation) & ((last - page) % dilation == 0)
    chosen |= page * page_size < pattern.initial_tokens
    if pattern.stride_tokens:
        chosen |= farthest // pattern.stride_tokens * pattern.stride_tokens >= nearest
    if pattern.random_tokens:
        random_pages = -(-pattern.random_tokens // page_size)
        chosen |= hash_uniform(start, head, page) * (last + 1) < random_pages
    keep.copy_((chosen & (farthest >= 0)).flatten(0, 1))


def pooled_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    pooled: torch.Tensor,
    scores: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    group = q.shape[1] // kv.shape[1]
    means = torch.stack([part.float().mean(0) for part in q.split(BLOCK_TOKENS)], 1)
    pooled[: scores.shape[0]] = means.flatten(0, 1).to(pooled.dtype)
    keys = _context_keys(kv, block_table, blocks, page_size).float()
    first = torch.arange(scores.shape[1], device=kv.device)[:, None] * page_size
    means = keys.sum(2) / (blocks.end_position - first).clamp(max=page_size)
    means = means.to(kv.dtype).float().repeat_interleave(group, 0)
    queries = pooled[: scores.shape[0]].float().unflatten(0, (-1, blocks.num_blocks))
    chosen = slice(None) if heads is None else heads.bool()
    scores.unflatten(0, (-1, blocks.num_blocks))[chosen] = (queries @ means.transpose(1, 2) * scale)[chosen]


def pattern_distance(
    mass: torch.Tensor,
    scores: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    threshold: float,
    query_aware: torch.Tensor,
) -> None:
    page = torch.arange(scores.shape[1], device=scores.device)
    tokens = (chunk.end_position - page * page_size).clamp(max=page_size)

    def of_blocks(of_pages: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum(-1) for part in of_pages.split(max(1, BLOCK_TOKENS // page_size), -1)], -1)

    pooled = (of_blocks(scores * tokens) / of_blocks(tokens)).softmax(1)
    true = of_blocks(mass.sum(1))
    true = true / true.sum(1, keepdim=True)
    both = torch.stack([pooled, true])
    divergence = torch.special.xlogy(both, both / both.mean(0).clamp(min=1e-38)).sum((0, 2)) / 2
    query_aware.copy_(divergence < threshold**2)


def antidiagonal_score(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    geometry: Geometry,
    scores: torch.Tensor,
) -> None:
    page_size, scale = geometry.page_size, geometry.scale
    stride, q_heads = 16, q.shape[1]
    keys = _context_keys(kv, block_table, blocks, page_size).float().flatten(1, 2)
    columns = keys.unflatten(1, (-1, stride)).flatten(2).repeat_interleave(q_heads // kv.shape[1], 0)
    out = scores.view(q_heads, blocks.num_blocks, -1)
    for block, part in enumerate(blocks.split(1)):
        query = q[block * BLOCK_TOKENS :][: part.num_tokens].float()
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, -part.num_tokens % stride))
        rows = query.transpose(0, 1).unflatten(1, (-1, stride)).flip(2).flatten(2)
        logits = rows @ columns.transpose(1, 2) * (scale / stride)
        row = torch.arange(logits.shape[1], device=q.device)
        last = part.first_position + ((row + 1) * stride).clamp(max=part.num_tokens) - 1
        unseen = torch.arange(logits.shape[2], device=q.device) * stride > last[:, None]
        weights = logits.masked_fill(unseen, float("-inf")).softmax(-1)
        mass = weights.unflatten(2, (scores.shape[1], -1)).sum((1, 3))
        out[:, block] = mass.clamp(min=1e-30).log()


def select_row_pages(
    scores: torch.Tensor,
    blocks: QueryBlocks,
    page_size: int,
    wanted_pages: int,
    top_p: float,
    keep: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    start, _ = _block_spans(blocks, scores.device)
    counts = (start // page_size).repeat(scores.shape[0] // blocks.num_blocks)
    for row, count in enumerate(counts.tolist()):
        if heads is not None and not heads[row // blocks.num_blocks]:
            continue
        keep[row] = 0
        if count == 0:
            continue
        mass = scores[row : row + 1, :count]
        mass.copy_((mass - mass.max()).exp())
        keep[row, :count] = (_fewest(mass, top_p) if top_p else _largest(mass, wanted_pages))[0]


def _context_keys(
    kv: torch.Tensor, block_table: torch.Tensor, blocks: QueryBlocks, page_size: int
) -> torch.Tensor:
    """[kv_heads, num_pages, page_size, head_dim], 0 past the last query."""
    pages, head_dim = blocks.num_pages(page_size), kv.shape[3] // 2
    keys = kv[block_table[:pages].long(), :, :page_size, :head_dim].transpose(0, 1)
    position = torch.arange(pages * page_size, device=kv.device).view(pages, page_size, 1)
    return keys.masked_fill(position >= blocks.end_position, 0)


def prefill_table(
    keep: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    kv: torch.Tensor,
    selection: Selection,
    counters: torch.Tensor,
    table: PageTable,
) -> None:
    page_size = selection.page_size
    start, end = _block_spans(blocks, keep.device)
    pages, q_heads = keep.shape[1], keep.shape[0] // blocks.num_blocks
    page = torch.arange(pages, device=keep.device)
    window_start = (start + 1 - max(selection.window_tokens, 1)).clamp(min=0) // page_size
    before_end = -(-end // page_size)
    always = (page < selection.sink_pages) | (page >= window_start[:, None])
    chosen = (keep.bool().unflatten(0, (q_heads, -1)) | always) & (page < before_end[:, None])
    lengths = end - (before_end - chosen.sum(-1)) * page_size
    table.lengths.copy_(lengths.flatten())
    heads = torch.arange(q_heads, device=keep.device)[:, None]
    table.starts[:-1] = (heads * blocks.num_tokens + start - blocks.first_position).flatten()
    table.starts[-1] = q_heads * blocks.num_tokens
    head = torch.arange(q_heads, device=keep.device) // (q_heads // kv.shape[1])
    head_page = HeadPageGrid.of(kv).head_pages(block_table[:pages], head[:, None])
    for row, mask in enumerate(chosen.flatten(0, 1)):
        head_pages = head_page[row // blocks.num_blocks, mask]
        table.head_pages[row, : len(head_pages)] = head_pages.int()
    queries = end - start
    unseen = queries * (queries - 1) // 2
    counters[0] += (queries * lengths - unseen).sum()
    counters[1] += (queries * end - unseen).sum() * q_heads


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
        weights = (query @ k.T * scale).masked_fill(hidden, float("-inf")).softmax(-1)
        out[tokens, head] = (weights @ v).to(out.dtype)


def hash_uniform(length, head: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in [0, 1), a pure function of its arguments (the Triton kernels have the same).

    A 32-bit finaliser (murmur3) over a mix of a length, a query head and a page index. In int32, which wraps:
    the host draws by it too.
    """
    length = torch.as_tensor(length, device=page.device)
    x = length.int() * _signed(0xC2B2AE3D) + head.int() * _signed(0x85EBCA77) + page.int() * _signed(0x9E3779B1)
    x ^= _shifted(x, 16)
    x *= _signed(0x85EBCA6B)
    x ^= _shifted(x, 13)
    x *= _signed(0xC2B2AE35)
    x ^= _shifted(x, 16)
    return _shifted(x, 8).float().div_(1 << 24)


def _signed(x: int) -> int:
    """The int32 of the same bits."""
    return x - (x >> 31 << 32)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 to the right, with zeros for a sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_spans(blocks: QueryBlocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and end position of each block, int64 [num_blocks]."""
    start = blocks.first_position + torch.arange(blocks.num_blocks, device=device) * BLOCK_TOKENS
    return start, (start + BLOCK_TOKENS).clamp(max=blocks.end_position)

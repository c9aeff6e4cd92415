"""select_bands: the pages and bands of diagonals that hold most of a chunk's estimated attention.

    page_mass[h, p] = sum_k mass[h, k, p]                          the vertical lines of a page
    band_mass[h, b] = sum_k mass[h, k, first_page - 1 + k - b]     the diagonals of a band

Sinks, which are always attended, count for neither. Each head has its pattern: a number of the largest of
each, or (``top_p`` > 0) those from a threshold on that together hold this share of its mass,

    page_mass[p] >= t  or  band_mass[b] >= t * max(1, 64 / page)

because a band costs a block of 128 queries several pages; the bands nearest to the query come on top. One
threshold for both leaves out the columns that kept diagonals hold already, and the other way round, which a
share of each (Lai et al., "FlexPrefill", arXiv 2502.20766) pays twice. Of equal masses at a threshold a
number takes the first, a share all; masses of 0 are never kept, unless everything is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.pages import probe
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.probe import band_shift, probe_groups, probe_page
from vllm_sparse.pages.query_blocks import QueryBlocks

ROUNDS: tl.constexpr = tl.constexpr(probe.COVER_ROUNDS)
OCTAVES: tl.constexpr = tl.constexpr(probe.COVER_OCTAVES)
FOLD_BLOCK: tl.constexpr = tl.constexpr(256)
COVER_BLOCK: tl.constexpr = tl.constexpr(1024)
BLOCK: tl.constexpr = tl.constexpr(2048)
"""Pages, or bands, that the steps work on at a time."""


@triton.jit(do_not_specialize=["mass_stride_h", "mass_stride_k", "num_pages", "first_page", "sink_pages"])
def _fold_bands(
    mass_ptr, masses_ptr, mass_stride_h, mass_stride_k, masses_stride_0, masses_stride_h, num_pages, first_page,
    sink_pages,
    BANDS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = tile * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    live = index < num_pages
    by_page = tl.zeros([FOLD_BLOCK], tl.float32)
    by_band = tl.zeros([FOLD_BLOCK], tl.float32)
    for k in tl.static_range(BANDS):
        row = mass_ptr + head * mass_stride_h + k * mass_stride_k
        by_page += tl.load(row + index, mask=live & (index >= sink_pages), other=0.0)
        page = first_page - 1 + k - index
        by_band += tl.load(row + page, mask=live & (page >= sink_pages) & (page < num_pages), other=0.0)
    tl.store(masses_ptr + head * masses_stride_h + index, by_page, mask=live)
    tl.store(masses_ptr + masses_stride_0 + head * masses_stride_h + index, by_band, mask=live)


@triton.jit
def _threshold(row_ptr, count, wanted, top_p, beside, BLOCK: tl.constexpr):
    """The largest key such that the masses from it on are enough; keys order masses as integers.

    ``beside``: mass that counts and is held in any case.
    """
    lanes = tl.arange(0, BLOCK)
    totals, highs = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        values = tl.load(row_ptr + start + lanes, mask=start + lanes < count, other=0.0)
        totals += values
        highs = tl.maximum(highs, values.to(tl.int32, bitcast=True))
    enough = tl.where(top_p > 0, top_p * (tl.sum(totals, axis=0) + beside) - beside, wanted)
    low, high = 1, tl.maximum(tl.max(highs, axis=0), 1) + 1
    # Invariant: what lies at or above ``low`` is enough, at or above ``high`` it is not.
    while high - low > 1:
        middle = low + (high - low) // 2
        held = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            values = tl.load(row_ptr + start + lanes, mask=start + lanes < count, other=0.0)
            worth = tl.where(top_p > 0, values, 1.0)
            held += tl.where(values.to(tl.int32, bitcast=True) >= middle, worth, 0.0)
        met = tl.sum(held, axis=0) >= enough
        low = tl.where(met, middle, low)
        high = tl.where(met, high, middle)
    return low


@triton.jit
def _count_from(row_ptr, count, threshold, BLOCK: tl.constexpr):
    held = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + index, mask=index < count, other=0.0)
        held += ((index < count) & (values.to(tl.int32, bitcast=True) >= threshold)).to(tl.int32)
    return tl.sum(held, axis=0)


@triton.jit
def _kept(row_ptr, index, count, threshold, ties, tied):
    """Mask of the masses past the threshold, and of the first ``ties`` at it; how many were at it so far."""
    keys = tl.load(row_ptr + index, mask=index < count, other=0.0).to(tl.int32, bitcast=True)
    level = ((index < count) & (keys == threshold)).to(tl.int32)
    first = (level > 0) & (tied + tl.cumsum(level, axis=0) <= ties)
    return (index < count) & ((keys > threshold) | first), tied + tl.sum(level, axis=0)


@triton.jit
def _store_kept(row_ptr, page_keep_ptr, num_pages, threshold, ties, BLOCK: tl.constexpr):
    tied = 0
    for start in range(0, num_pages, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keep, tied = _kept(row_ptr, index, num_pages, threshold, ties, tied)
        tl.store(page_keep_ptr + index, keep.to(tl.uint8), mask=index < num_pages)


@triton.jit
def _store_counts(row_ptr, band_count_ptr, num_bands, threshold, ties, recent_bands, BLOCK: tl.constexpr):
    before, tied = 0, 0
    tl.store(band_count_ptr, 0)
    for start in range(0, num_bands, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keep, tied = _kept(row_ptr, index, num_bands, threshold, ties, tied)
        kept = (keep | ((index < recent_bands) & (index < num_bands))).to(tl.int32)
        tl.store(band_count_ptr + index + 1, before + tl.cumsum(kept, axis=0), mask=index < num_bands)
        before += tl.sum(kept, axis=0)


@triton.jit
def _cover_threshold(
    mass_ptr, by_page_ptr, by_band_ptr, mass_stride_k, num_pages, first_page, sink_pages, top_p,
    BANDS: tl.constexpr, BAND_SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest key such that the pages from it on and the bands from as much more on are enough."""
    lanes = tl.arange(0, COVER_BLOCK)
    totals, highs = tl.zeros([COVER_BLOCK], tl.float32), tl.zeros([COVER_BLOCK], tl.int32)
    for start in range(0, num_pages, COVER_BLOCK):
        index = start + lanes
        of_page = tl.load(by_page_ptr + index, mask=index < num_pages, other=0.0)
        of_band = tl.load(by_band_ptr + index, mask=index < num_pages, other=0.0)
        totals += of_page
        highs = tl.maximum(highs, of_page.to(tl.int32, bitcast=True))
        highs = tl.maximum(highs, of_band.to(tl.int32, bitcast=True) - BAND_SHIFT)
    enough = top_p * tl.sum(totals, axis=0)
    high = tl.maximum(tl.max(highs, axis=0), 1) + 1
    low = tl.maximum(high - OCTAVES * 0x800000, 1)
    for _ in range(ROUNDS):
        middle = low + (high - low) // 2
        held = tl.zeros([COVER_BLOCK], tl.float32)
        for start in range(0, num_pages, COVER_BLOCK):
            index = start + lanes
            live = (index < num_pages) & (index >= sink_pages)
            of_page = tl.load(by_page_ptr + index, mask=live, other=0.0)
            column = of_page.to(tl.int32, bitcast=True) >= middle
            for k in tl.static_range(BANDS):
                band = first_page - 1 + k - index
                cell = tl.load(mass_ptr + k * mass_stride_k + index, mask=live, other=0.0)
                of_band = tl.load(by_band_ptr + band, mask=live & (band >= 0) & (band < num_pages), other=0.0)
                diagonal = of_band.to(tl.int32, bitcast=True) - BAND_SHIFT >= middle
                held += tl.where(column | diagonal, cell, 0.0)
        met = tl.sum(held, axis=0) >= enough
        low = tl.where(met, middle, low)
        high = tl.where(met, high, middle)
    return low


@triton.jit(
    do_not_specialize=["mass_stride_h", "mass_stride_k", "num_pages", "first_page", "sink_pages", "q_heads"]
)
def _select_bands(
    mass_ptr, masses_ptr, sizes_ptr, top_ps_ptr, page_keep_ptr, band_count_ptr, mass_stride_h, mass_stride_k,
    masses_stride_0, masses_stride_h, keep_stride_h, count_stride_h, num_pages, first_page, sink_pages, q_heads,
    BANDS: tl.constexpr, BAND_SHIFT: tl.constexpr,
):  # fmt: skip
    head, diagonal = tl.program_id(0).to(tl.int64), tl.program_id(1)
    by_page = masses_ptr + head * masses_stride_h
    row = by_page + diagonal * masses_stride_0
    top_p, wanted = tl.load(top_ps_ptr + head), tl.load(sizes_ptr + diagonal * q_heads + head)
    everything = (top_p >= 1) | (wanted >= num_pages)
    threshold, ties = tl.where(everything, 0, 0x7FFFFFFF), num_pages
    if (top_p > 0) & (top_p < 1):
        # Both programs of a head find what its pages and bands share: side by side that takes no longer.
        threshold = _cover_threshold(
            mass_ptr + head * mass_stride_h, by_page, by_page + masses_stride_0, mass_stride_k, num_pages,
            first_page,
            sink_pages, top_p, BANDS, BAND_SHIFT,
        ) + diagonal * BAND_SHIFT  # fmt: skip
    elif (wanted > 0) & (everything == 0):
        threshold = _threshold(row, num_pages, wanted, 0.0, 0.0, BLOCK)
        ties = wanted - _count_from(row, num_pages, threshold + 1, BLOCK)
    if diagonal == 1:
        recent_bands = tl.load(sizes_ptr + 2 * q_heads + head)
        _store_counts(row, band_count_ptr + head * count_stride_h, num_pages, threshold, ties, recent_bands, BLOCK)
    else:
        _store_kept(row, page_keep_ptr + head * keep_stride_h, num_pages, threshold, ties, BLOCK)


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
    """Choose the vertical pages and slash bands of a chunk, per query head.

    Args:
        mass: float32 [q_heads, groups + 1, num_pages], from ``probe_mass``.
        chunk, page_size: where the probe lies.
        patterns: how many pages and bands each head keeps (all from ``num_pages`` on), or which share of
            its mass they must hold together.
        sink_pages: first pages, which are attended whatever is chosen here.
        masses: float32 [2, q_heads, num_pages or more], overwritten.
        page_keep: uint8 [q_heads, num_pages or more], overwritten.
        band_count: int32 [q_heads, num_pages + 1 or more], overwritten: kept bands before each band.
    """
    q_heads, bands, num_pages = mass.shape
    assert bands == probe_groups(page_size) + 1 and num_pages == chunk.num_pages(page_size)
    assert mass.stride(2) == masses.stride(2) == page_keep.stride(1) == band_count.stride(1) == 1
    assert patterns.sizes.shape == (3, q_heads) and patterns.sizes.is_contiguous()
    assert patterns.top_p.shape == (q_heads,) and patterns.top_p.is_contiguous()
    first_page = probe_page(chunk, page_size)
    _fold_bands[(triton.cdiv(num_pages, FOLD_BLOCK.value), q_heads)](
        mass, masses, mass.stride(0), mass.stride(1), masses.stride(0), masses.stride(1),
        num_pages, first_page, sink_pages, BANDS=bands, num_warps=2,
    )  # fmt: skip
    _select_bands[(q_heads, 2)](
        mass, masses, patterns.sizes, patterns.top_p, page_keep, band_count, mass.stride(0), mass.stride(1),
        masses.stride(0), masses.stride(1), page_keep.stride(0), band_count.stride(0), num_pages, first_page,
        sink_pages, q_heads, BANDS=bands, BAND_SHIFT=band_shift(page_size),
        num_warps=8,
    )  # fmt: skip

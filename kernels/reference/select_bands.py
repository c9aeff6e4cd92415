"""Reference of :mod:`vllm_sparse.kernels.select_bands`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.probe import COVER_OCTAVES, COVER_ROUNDS, band_shift, probe_page
from vllm_sparse.pages.query_blocks import QueryBlocks


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
    kept_pages, kept_bands = largest(by_page, wanted_pages), largest(by_band, wanted_bands)
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


def largest(masses: torch.Tensor, wanted: torch.Tensor | int) -> torch.Tensor:
    """Mask of the ``wanted`` (a number, or [rows, 1]) largest of each row, equal ones from the left."""
    rank = masses.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    everything = torch.as_tensor(wanted, device=masses.device) >= masses.shape[1]
    return ((rank < wanted) & (masses > 0)) | everything

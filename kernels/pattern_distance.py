"""pattern_distance: can mean-pooled keys tell where a head attends?

    P[h, n]        = softmax_n mean_{p in n} score[h, p]                what pooling says of the probe
    A[h, n]        = sum_{p in n} sum_k mass[h, k, p] / sum_k,p mass    where the probe attends
    M              = (P + A) / 2
    distance[h]    = sqrt(1/2 sum_n P log(P / M) + 1/2 sum_n A log(A / M))
    query_aware[h] = distance[h] < threshold

``n`` runs over blocks of 128 keys, or pages where those are larger; the mean counts a page by its tokens, so
that it is the score of the block's mean key. The square root of the Jensen-Shannon divergence, natural
logarithm: 0 to 0.83. Lai et al., "FlexPrefill", arXiv 2502.20766, whose threshold was chosen for blocks of
128: distances by page are larger.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks

TILE: tl.constexpr = tl.constexpr(1024)
"""Pages read at a time."""


@triton.jit
def _divergence_from(part, other):
    """part log(part / mean), 0 where nothing is."""
    return tl.where(part > 0, part * tl.log(tl.maximum(part, 2e-38) / tl.maximum((part + other) / 2, 2e-38)), 0.0)


@triton.jit
def _of_blocks(of_pages, PER_BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(of_pages, [of_pages.shape[0] // PER_BLOCK, PER_BLOCK]), axis=1)


@triton.jit
def _block_mass(mass_ptr, pages, num_pages, mass_stride_k, BANDS: tl.constexpr, PER_BLOCK: tl.constexpr):
    total = tl.zeros(pages.shape, tl.float32)
    for k in tl.static_range(BANDS):
        total += tl.load(mass_ptr + k * mass_stride_k + pages, mask=pages < num_pages, other=0.0)
    return _of_blocks(total, PER_BLOCK)


@triton.jit
def _block_score(score_ptr, pages, num_pages, end_position, PAGE: tl.constexpr, PER_BLOCK: tl.constexpr):
    """-inf past the last page."""
    score = tl.load(score_ptr + pages, mask=pages < num_pages, other=0.0)
    tokens = tl.minimum(tl.maximum(end_position - pages * PAGE, 0), PAGE).to(tl.float32)
    total = _of_blocks(tokens, PER_BLOCK)
    mean = _of_blocks(score * tokens, PER_BLOCK) / tl.maximum(total, 1.0)
    return tl.where(total > 0, mean, float("-inf"))


@triton.jit(
    do_not_specialize=["mass_stride_h", "mass_stride_k", "score_stride", "num_pages", "end_position", "threshold"]
)
def _pattern_distance(
    mass_ptr, scores_ptr, query_aware_ptr, mass_stride_h, mass_stride_k, score_stride, num_pages, end_position,
    threshold,
    BANDS: tl.constexpr, PAGE: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    cells = mass_ptr + head.to(tl.int64) * mass_stride_h
    row = scores_ptr + head.to(tl.int64) * score_stride
    lanes = tl.arange(0, TILE)
    tops = tl.full([TILE // PER_BLOCK], float("-inf"), tl.float32)
    weights, masses = tl.zeros_like(tops), tl.zeros_like(tops)
    for first in range(0, num_pages, TILE):
        pages = first + lanes
        score = _block_score(row, pages, num_pages, end_position, PAGE, PER_BLOCK)
        new_tops = tl.maximum(tops, score)
        peaks = tl.where(new_tops == float("-inf"), 0.0, new_tops)
        weights = weights * tl.exp(tops - peaks) + tl.exp(score - peaks)
        tops = new_tops
        masses += _block_mass(cells, pages, num_pages, mass_stride_k, BANDS, PER_BLOCK)
    top = tl.max(tops, axis=0)
    weight = tl.sum(weights * tl.exp(tops - top), axis=0)
    total = tl.sum(masses, axis=0)
    divergence = tl.zeros_like(tops)
    for first in range(0, num_pages, TILE):
        pages = first + lanes
        pooled = tl.exp(_block_score(row, pages, num_pages, end_position, PAGE, PER_BLOCK) - top) / weight
        true = _block_mass(cells, pages, num_pages, mass_stride_k, BANDS, PER_BLOCK) / total
        divergence += _divergence_from(pooled, true) + _divergence_from(true, pooled)
    aware = tl.sum(divergence, axis=0) / 2 < threshold * threshold
    tl.store(query_aware_ptr + head, aware.to(tl.uint8))


def pattern_distance(
    mass: torch.Tensor,
    scores: torch.Tensor,
    chunk: QueryBlocks,
    page_size: int,
    threshold: float,
    query_aware: torch.Tensor,
) -> None:
    """Flag the heads whose attention mean-pooled keys foretell.

    Args:
        mass: float32 [q_heads, groups + 1, num_pages], from ``probe_mass``.
        scores: float32 [q_heads, num_pages], from ``pooled_score`` for the probe's queries as one block.
        chunk, page_size: the context that both are of.
        threshold: the distance below which a head is query-aware.
        query_aware: uint8 [q_heads], overwritten by 0 or 1.
    """
    q_heads, bands, num_pages = mass.shape
    assert scores.shape == (q_heads, num_pages) and num_pages == chunk.num_pages(page_size)
    assert query_aware.shape == (q_heads,)
    assert mass.stride(2) == scores.stride(1) == query_aware.stride(0) == 1
    _pattern_distance[(q_heads,)](
        mass, scores, query_aware, mass.stride(0), mass.stride(1), scores.stride(0), num_pages, chunk.end_position,
        float(threshold), BANDS=bands, PAGE=page_size, PER_BLOCK=max(1, BLOCK_TOKENS // page_size),
        num_warps=8,
    )  # fmt: skip

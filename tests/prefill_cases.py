"""Random prefill chunks over the paged caches of :mod:`cases`, and explicit masks to hold them against."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from cases import DEVICE, make

from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.probe import probe_parts
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.prefill.buffers import PrefillBuffers

SIXTEEN_BITS = 1.1e-2
"""Relative error of shares whose logits were float16, of at most 32 to base 2: half a step of 2**-6 in the logit,
and as much in the sum. Random cases have logits up to 20."""


@dataclass
class PrefillCase:
    """One request's chunk: queries at ``blocks`` over a cache that holds all of its context."""

    q: torch.Tensor
    kv: torch.Tensor
    block_table: torch.Tensor
    blocks: QueryBlocks
    buffers: PrefillBuffers
    page_size: int
    scale: float
    kv_scales: tuple[float, float] = (1.0, 1.0)

    @property
    def q_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_pages(self) -> int:
        return self.blocks.num_pages(self.page_size)

    @property
    def group(self) -> int:
        return self.q_heads // self.kv.shape[1]

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.q, self.kv, self.page_size, self.scale).quantised(*self.kv_scales, 1.0)


def make_chunk(
    first_position: int,
    num_tokens: int,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    layers: int = 1,
    later_tokens: int = 0,
    **cache,
) -> PrefillCase:
    """A chunk whose outputs, and buffers, start as poison; ``later_tokens`` of context follow it.

    ``cache``: what :func:`cases.make` takes about the dtype and scales of the cache.
    """
    end = first_position + num_tokens
    case = make(
        [end + later_tokens], kv_heads, group, head_dim, page_size, dtype=dtype, layers=layers, seed=seed, **cache
    )  # fmt: skip
    q_heads = kv_heads * group
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    q = torch.randn(num_tokens, q_heads, head_dim, generator=generator)
    buffers = PrefillBuffers.allocate(q_heads, head_dim, page_size, end, num_tokens, dtype, DEVICE)
    buffers.scratch = torch.empty(2, probe_parts(end), dtype=dtype, device=DEVICE)  # a CPU allocates none
    poison(buffers)
    return PrefillCase(
        q=(3 * q).to(dtype).to(DEVICE), kv=case.kv, block_table=case.block_table[0],
        blocks=QueryBlocks(0, 0, num_tokens, first_position), buffers=buffers, page_size=page_size,
        scale=case.scale, kv_scales=case.kv_scales,
    )  # fmt: skip


def poison(buffers: PrefillBuffers) -> None:
    for name in ("head_pages", "lengths", "starts", "band_count"):
        getattr(buffers, name).fill_(2**30)
    for name in ("keep", "page_keep", "query_aware"):
        getattr(buffers, name).fill_(77)
    for name in ("masses", "probe_lse", "scratch"):
        getattr(buffers, name).fill_(float("nan"))


def random_keep(case: PrefillCase, density: float = 0.3) -> torch.Tensor:
    """uint8 [q_heads * num_blocks, num_pages]."""
    rows = case.q_heads * case.blocks.num_blocks
    return (torch.rand(rows, case.num_pages, device=DEVICE) < density).to(torch.uint8)


def causal_mask(case: PrefillCase) -> torch.Tensor:
    """bool [num_tokens, context tokens]: keys up to each query's position."""
    positions = case.blocks.first_position + torch.arange(case.blocks.num_tokens, device=DEVICE)
    return torch.arange(case.blocks.end_position, device=DEVICE) <= positions[:, None]


def expected_mask(case: PrefillCase, keep: torch.Tensor, sink_pages: int, window_tokens: int) -> torch.Tensor:
    """bool [q_heads, num_tokens, context tokens]: what a keep mask means, token by token.

    A block keeps whole pages: those of the mask, sinks, and those that hold its own tokens or the
    window of its first query.
    """
    blocks, page = case.blocks, case.page_size
    kept = keep.bool().view(case.q_heads, blocks.num_blocks, -1).clone()
    for block in range(blocks.num_blocks):
        start = blocks.first_position + block * BLOCK_TOKENS
        kept[:, block, :sink_pages] = True
        kept[:, block, max(0, start + 1 - max(window_tokens, 1)) // page :] = True
    by_token = kept.repeat_interleave(page, 2)[..., : blocks.end_position]
    by_query = by_token.repeat_interleave(BLOCK_TOKENS, 1)[:, : blocks.num_tokens]
    return by_query & causal_mask(case)


def table_mask(case: PrefillCase, table: PageTable) -> torch.Tensor:
    """bool [q_heads, num_tokens, context tokens]: what an attention kernel attends through ``table``."""
    blocks, page = case.blocks, case.page_size
    mask = torch.zeros(case.q_heads, blocks.num_tokens, blocks.end_position, dtype=torch.bool, device=DEVICE)
    position_of = {block: index for index, block in enumerate(case.block_table[: case.num_pages].tolist())}
    for row, length in enumerate(table.lengths.tolist()):
        head, block = divmod(row, blocks.num_blocks)
        named, heads = HeadPageGrid.of(case.kv).split(table.head_pages[row, : -(-length // page)])
        assert (heads == head // case.group).all(), "another KV head"
        pages = [position_of[block] for block in named.tolist()]
        assert all(a < b for a, b in itertools.pairwise(pages)), "pages do not ascend"
        tokens = torch.tensor([p * page + i for p in pages for i in range(page)])[:length]
        queries = range(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, blocks.num_tokens))
        for i, query in enumerate(queries):
            mask[head, query, tokens[: length - (len(queries) - 1 - i)].to(DEVICE)] = True
    return mask


def keys_and_values(case: PrefillCase) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [q_heads, context tokens, head_dim] each, gathered from the pages."""
    pages = case.kv[case.block_table[: case.num_pages].long(), :, : case.page_size].double()
    context = pages.transpose(0, 1).flatten(1, 2)[:, : case.blocks.end_position]
    parts = zip(context.chunk(2, -1), case.kv_scales, strict=True)
    return tuple(part.repeat_interleave(case.group, 0) * scale for part, scale in parts)


def masked_attention(case: PrefillCase, mask: torch.Tensor) -> torch.Tensor:
    """float64 [num_tokens, q_heads, head_dim]."""
    keys, values = keys_and_values(case)
    logits = case.q.double().transpose(0, 1) @ keys.transpose(1, 2) * case.scale
    return (logits.masked_fill(~mask, float("-inf")).softmax(-1) @ values).transpose(0, 1)


def attention_weights(case: PrefillCase) -> torch.Tensor:
    """float64 [q_heads, num_tokens, context tokens]: dense causal attention."""
    keys, _ = keys_and_values(case)
    logits = case.q.double().transpose(0, 1) @ keys.transpose(1, 2) * case.scale
    return logits.masked_fill(~causal_mask(case), float("-inf")).softmax(-1)

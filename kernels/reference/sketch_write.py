"""Sketches as :mod:`vllm_sparse.kernels.sketch_write` stores them, and the keys they stand for."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.hadamard import hadamard
from vllm_sparse.pages.summaries import TILE_TOKENS, SketchLayout

STEP, SMALLEST = 0.9957, 1e-7


def write_sketches(kv: torch.Tensor, slots: torch.Tensor, page_size: int, summary: str) -> None:
    """Sketch the tiles of ``kv`` whose last row is one of ``slots`` (int64, none negative)."""
    head_dim = kv.shape[-1] // 2
    layout = SketchLayout.of(summary, head_dim)
    tiles = slots[slots % TILE_TOKENS == TILE_TOKENS - 1] // TILE_TOKENS
    block, tile = tiles * TILE_TOKENS // page_size, tiles % (page_size // TILE_TOKENS)
    rows = tile[:, None] * TILE_TOKENS + torch.arange(TILE_TOKENS, device=kv.device)
    keys = kv[block[:, None], :, rows, :head_dim].transpose(1, 2).float()  # [tiles, heads, tokens, head_dim]
    keys = torch.nn.functional.pad(keys, (0, layout.width - head_dim))
    sketches = _sketch(keys, layout)
    pages = _summary_bytes(kv, page_size)
    for i, (b, start) in enumerate(zip(block.tolist(), (tile * layout.tile_bytes).tolist(), strict=True)):
        pages[b, :, start : start + sketches.shape[-1]] = sketches[i]


def _sketch(keys: torch.Tensor, layout: SketchLayout) -> torch.Tensor:
    """int8 [tiles, heads, bytes] of float32 ``keys`` [tiles, heads, 16, width]."""
    levels = 2**layout.bits
    u = hadamard(keys)
    mean = u.mean(2, keepdim=True)
    mean_scale = (mean.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST)
    rounded = (mean / mean_scale + 0.5).floor()
    residual = u - rounded * mean_scale
    size = residual.square().mean(-1, keepdim=True).sqrt().clamp(min=SMALLEST)
    code = ((residual / (size * STEP)).floor() + levels // 2).clamp(0, levels - 1)
    level = code - (levels - 1) / 2
    scale = ((residual * level).sum(-1) / level.square().sum(-1)).to(torch.bfloat16)
    fields = 8 // layout.bits
    weight = 2 ** (layout.bits * torch.arange(fields, device=keys.device))
    packed = (code.unflatten(2, (layout.planes, fields)) * weight[:, None]).sum(3) - 128
    parts = [packed.flatten(2), rounded.flatten(2), scale, mean_scale.flatten(2)]
    parts[:2] = [part.to(torch.int8) for part in parts[:2]]
    return torch.cat([part.contiguous().view(torch.int8) for part in parts], -1)


def sketched_keys(kv: torch.Tensor, page_size: int, summary: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated keys that the sketches of ``kv`` stand for, float32 [num_blocks, kv_heads, page_size, width],
    and the scale of each key's codes, float32 [num_blocks, kv_heads, page_size]."""
    layout = SketchLayout.of(summary, kv.shape[-1] // 2)
    levels, fields = 2**layout.bits, 8 // layout.bits
    tiles = page_size // TILE_TOKENS
    sketches = _summary_bytes(kv, page_size)[..., : tiles * layout.tile_bytes].unflatten(-1, (tiles, -1))

    def part(start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return sketches[..., start:end].contiguous().view(dtype).float()

    # As bytes, and masked: evaluations on a CPU spend most of their time here.
    packed = sketches[..., : layout.mean].contiguous().view(torch.uint8) ^ 128
    packed = packed.unflatten(-1, (layout.planes, 1, -1))
    shift = layout.bits * torch.arange(fields, dtype=torch.uint8, device=kv.device)
    level = ((packed >> shift[:, None]) & levels - 1).flatten(3, 4) - (levels - 1) / 2
    mean = part(layout.mean, layout.scales, torch.int8)
    scale = part(layout.scales, layout.mean_scale, torch.bfloat16)
    mean_scale = part(layout.mean_scale, layout.mean_scale + 4, torch.float32)
    keys = (mean * mean_scale)[..., None, :] + scale[..., None] * level
    return keys.flatten(2, 3), scale.flatten(2)


def _summary_bytes(kv: torch.Tensor, page_size: int) -> torch.Tensor:
    """The summary slots of ``kv`` as int8 [num_blocks, kv_heads, bytes], no copy."""
    rows = kv.view(torch.int8)[:, :, page_size:]
    return rows.as_strided(
        (*rows.shape[:2], rows.shape[2] * rows.shape[3]), (*rows.stride()[:2], 1), rows.storage_offset()
    )

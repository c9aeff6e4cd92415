"""Reference of :mod:`vllm_sparse.kernels.page_write`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import in_cache
from vllm_sparse.kernels.reference.sketch_write import write_sketches
from vllm_sparse.pages.summaries import SKETCH_BITS

SCALE_BITS, SCALE_LEVELS, SMALLEST_SCALE = 16, 125.9, 1e-7


def page_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    summary: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    slots = slot_mapping.long()
    written = slots >= 0
    if not written.any():
        return
    tokens, slots = torch.nonzero(written).squeeze(1), slots[written]
    blocks, rows = slots // page_size, slots % page_size
    parts = ((key, k_scale), (value, v_scale))
    kv[blocks, :, rows] = torch.cat([in_cache(part[tokens], kv.dtype, scale) for part, scale in parts], dim=-1)
    if summary in SKETCH_BITS:
        write_sketches(kv, slots, page_size, summary)
    if summary != "key_range":
        return
    head_dim = key.shape[-1]
    complete = blocks[rows == page_size - 1]
    keys = kv[complete, :, :page_size, :head_dim].float()
    low, high = keys.amin(2), keys.amax(2)
    x, c_scale, bits = _steps(low + (high - low) * 0.5)
    c = torch.floor(x + 0.5)
    c[..., :SCALE_BITS] = 2 * torch.floor((x[..., :SCALE_BITS] - bits) * 0.5 + 0.5) + bits
    x, _, bits = _steps(torch.maximum(high - c * c_scale, c * c_scale - low))
    w = x.ceil()
    w[..., :SCALE_BITS] = 2 * torch.ceil((x[..., :SCALE_BITS] - bits) * 0.5) + bits
    row = kv[complete, :, page_size]
    row.view(torch.int8)[..., : 2 * head_dim] = torch.cat([c, w], -1).to(torch.int8)
    kv[complete, :, page_size] = row


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

"""What some models do to logits before softmax, and softmax beside a sink."""

from __future__ import annotations

import torch

from vllm_sparse.pages.geometry import Geometry


def capped(logits: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Logits as they are, or within the soft cap of the layer."""
    return geometry.soft_cap * (logits / geometry.soft_cap).tanh() if geometry.soft_cap else logits


def softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of ``logits`` [..., tokens] beside ``sinks``, which broadcast to [...] and have no value."""
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.to(logits.dtype)[..., None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]

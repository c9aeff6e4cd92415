"""Geometry: what one attention layer's numbers are, for everything that works on its pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """Heads of a layer on this rank, their size, the size of its pages, and the softmax scale."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    """Tokens per page."""
    scale: float
    """Factor of the logits before softmax."""

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    @classmethod
    def of(cls, q: torch.Tensor, kv: torch.Tensor, page_size: int, scale: float) -> Geometry:
        """The geometry of ``q`` [tokens, q_heads, head_dim] over ``kv`` [num_blocks, kv_heads, ...]."""
        return cls(q.shape[1], kv.shape[1], q.shape[2], page_size, scale)

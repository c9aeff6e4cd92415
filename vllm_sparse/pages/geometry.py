"""Geometry: what one attention layer's numbers are, for everything that works on its pages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    """Factor of the logits of keys as they are stored, before softmax."""
    k_scale: float = 1.0
    v_scale: float = 1.0
    """What K and V were divided by before they were stored in 8 bits; ``scale`` has that of K in it."""
    q_scale: float = 1.0
    """What queries are divided by where a kernel wants them in 8 bits, too; 1 of other caches, as all of these."""
    soft_cap: float = 0.0
    """Logits x are ``soft_cap * tanh(x / soft_cap)``; 0: they are x."""
    sink_logits: torch.Tensor | None = field(default=None, compare=False)
    """[q_heads], of any float dtype: a logit that each query head has beside those of its keys, without a value.
    The model's parameter itself, whose weights may come later."""

    @property
    def plain(self) -> bool:
        """Whether softmax is of the logits alone, as they are."""
        return not self.soft_cap and self.sink_logits is None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    def quantised(self, k_scale: float, v_scale: float, q_scale: float) -> Geometry:
        """The geometry of a layer whose pages hold e4m3 codes of ``K / k_scale`` and ``V / v_scale``."""
        return replace(self, scale=self.scale * k_scale, k_scale=k_scale, v_scale=v_scale, q_scale=q_scale)

    @classmethod
    def of(cls, q: torch.Tensor, kv: torch.Tensor, page_size: int, scale: float) -> Geometry:
        """The geometry of ``q`` [tokens, q_heads, head_dim] over ``kv`` [num_blocks, kv_heads, ...]."""
        return cls(q.shape[1], kv.shape[1], q.shape[2], page_size, scale)

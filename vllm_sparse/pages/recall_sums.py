"""RecallSums: what the device adds up of the attention mass that chosen pages hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PARTS = 64
"""Programs that share the pages of the sampled row, for each KV head."""


@dataclass
class RecallSums:
    """Written by :mod:`vllm_sparse.kernels.recall_mass`; the device counts steps, so a CUDA graph replays it."""

    every: int
    """Steps from one sample to the next."""
    step: torch.Tensor
    """int64 [1]: decode steps so far."""
    sums: torch.Tensor
    """float64 [layers, kv_heads, 2]: shares added up, and how many."""
    parts: torch.Tensor
    """float32 [kv_heads, PARTS, 4, group]: largest logit and sum of exponentials relative to it, over all
    pages and over the chosen ones; what the programs of a row leave for the last of them."""
    arrivals: torch.Tensor
    """int32 [kv_heads], 0 between launches: programs that are done."""

    @classmethod
    def allocate(cls, every: int, layers: int, q_heads: int, kv_heads: int, device: torch.device) -> RecallSums:
        return cls(
            every,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(layers, kv_heads, 2, dtype=torch.float64, device=device),
            torch.zeros(kv_heads, PARTS, 4, q_heads // kv_heads, device=device),
            torch.zeros(kv_heads, dtype=torch.int32, device=device),
        )

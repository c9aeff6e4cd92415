"""What an engine is: attention of one query token per request over a PageTable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_sparse.page_table import PageTable


@dataclass(frozen=True)
class AttentionShape:
    """What an engine must know of a layer to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


class Engine(ABC):
    """Computes attention over chosen pages. Engines know nothing of how pages are chosen."""

    @classmethod
    @abstractmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        """Why this engine cannot serve ``shape`` here, or None if it can."""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        table: PageTable,
        page_size: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention of each query over its pages to ``out``.

        Args:
            q: [num_reqs, q_heads, head_dim].
            kv: [num_blocks, kv_heads, page_size + summary rows, 2 * head_dim].
            table: the chosen pages; rows of length 0 leave ``out`` untouched.
            page_size: tokens per page.
            scale: softmax scale.
            out: [num_reqs, q_heads, head_dim], the dtype of ``q``.
        """

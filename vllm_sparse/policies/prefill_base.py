"""What a prefill policy is: pages to keep for each (query head, query block)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.prefill.buffers import PrefillBuffers


class PrefillPolicy(ABC):
    """Chooses pages for blocks of 128 queries; causality, sinks and the recent window are shared by all.

    A block's own pages, the first ``sink_tokens`` and the ``window_tokens`` before each query are kept
    whatever a policy says, and pages after a block never are.
    """

    def __init__(self, config: SparseConfig, page_size: int, patterns: HeadPatterns):
        """``patterns``: sizes of the layer's query heads, for policies that differ by head."""
        self.config, self.page_size, self.patterns = config, page_size, patterns

    def pages_in_reach(self, chunk: QueryBlocks, q_heads: int) -> torch.Tensor | None:
        """Pages before ``chunk`` that some (query head, block) of it may keep, or None: any of them.

        For policies that never look at a key: with offload no other page of the context is read from the host.
        Called once per step, on the host. Sinks and window need not be named.

        Args:
            chunk: all of the request's queries in this step.
            q_heads: query heads of this rank.

        Returns:
            bool [pages that are complete before the chunk], on the CPU.
        """
        return None

    def estimate(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        block_table: torch.Tensor,
        chunk: QueryBlocks,
        scale: float,
        buffers: PrefillBuffers,
    ) -> None:
        """Called once per layer and chunk, before its first ``choose``; may leave results in ``buffers``.

        Arguments as in :meth:`choose`; ``chunk`` is all of the request's queries in this step.
        """
        return None

    @abstractmethod
    def choose(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        block_table: torch.Tensor,
        blocks: QueryBlocks,
        scale: float,
        buffers: PrefillBuffers,
        keep: torch.Tensor,
    ) -> None:
        """Write which pages each (query head, block) keeps: higher than 0 means attend.

        Args:
            q: [num_tokens, q_heads, head_dim], the queries of ``blocks``.
            kv: [num_blocks, kv_heads, page_size + summary rows, 2 * head_dim], these tokens included.
            block_table: int32 [max_pages] of the request.
            blocks: where the queries lie in their context; a part of the chunk, in order.
            scale: softmax scale.
            buffers: as ``estimate`` left them.
            keep: uint8 [q_heads * num_blocks, num_pages], to be written in full.
        """

"""Interfaces of policies, which choose pages. Decode policies score pages, prefill policies mark pages to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.prefill.buffers import PrefillBuffers


class DecodePolicy(ABC):
    """Scores the pages of each request; selection, sinks, window and budget are shared by all policies.

    Selection reads a row of scores as log-masses: it normalises each query head over the pages of its request
    (a softmax), sums the query heads of a KV head, and keeps exactly ``budget`` pages.
    """

    summary: str = "none"
    """The summary that each page stores beside K and V: one of :data:`vllm_sparse.pages.summaries.SUMMARIES`."""
    adaptive: bool = False
    """Whether a row ends where its pages hold ``SparseConfig.top_p`` of its estimated attention, before its
    budget; scores must then be estimates of true masses."""

    @abstractmethod
    def score(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        block_table: torch.Tensor,
        plan: DecodePlan,
        geometry: Geometry,
        scores: PageScores,
    ) -> None:
        """Write the score of every page to be scored: higher means attend, in units of log-mass.

        Args:
            q: [num_tokens, q_heads, head_dim], those of ``plan.queries``; a request's pages are scored by the mean
                of its tokens' queries.
            kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim].
            block_table: int32 [num_reqs, max_pages].
            plan: of the step; rows with ``score_offsets >= 0`` are to be scored, from that column on.
            geometry: of the layer.
            scores: to be written; kernels do so through :mod:`vllm_sparse.kernels.store_scores`.
        """


@dataclass(frozen=True)
class PrefillSizes:
    """Settings of the pages that a chunk keeps."""

    vertical_tokens: int
    """Tokens kept wherever the query is."""
    slash_tokens: int
    """Tokens kept by their distance from the query."""
    top_p: float
    """Share of the estimated attention to keep; 0: the sizes above."""
    sink_pages: int
    """First pages, which are kept whatever a policy says."""


class PrefillPolicy(ABC):
    """Chooses pages for blocks of 128 queries; causality, sinks and the recent window are shared by all policies.

    A block's own pages, the first ``sink_tokens`` and the ``window_tokens`` before each query are kept whatever a
    policy says, and pages after a block never are.
    """

    def __init__(self, sizes: PrefillSizes, page_size: int, patterns: HeadPatterns):
        """``patterns``: sizes of the layer's query heads, for policies that differ by head."""
        self.sizes, self.page_size, self.patterns = sizes, page_size, patterns

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
        geometry: Geometry,
        buffers: PrefillBuffers,
    ) -> None:
        """Estimate once per layer and chunk, before its first ``choose``; may leave results in ``buffers``.

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
        geometry: Geometry,
        buffers: PrefillBuffers,
        keep: torch.Tensor,
    ) -> None:
        """Write which pages each (query head, block) keeps: higher than 0 means attend.

        Args:
            q: [num_tokens, q_heads, head_dim], the queries of ``blocks``.
            kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim], these tokens included.
            block_table: int32 [max_pages] of the request.
            blocks: where the queries lie in their context; a part of the chunk, in order.
            geometry: of the layer.
            buffers: as ``estimate`` left them.
            keep: uint8 [q_heads * num_blocks, num_pages], to be written in full.
        """

"""What a decode policy is: a score per (query head, page)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_scores import PageScores


class DecodePolicy(ABC):
    """Scores the pages of each request; selection, sinks, window and budget are shared by all.

    Selection reads a row of scores as log-masses: it normalises each query head over the pages of
    its request (a softmax), sums the group per KV head, and keeps exactly ``budget`` pages.
    """

    summary: ClassVar[str] = "none"
    """What each page stores beside K and V: one of :data:`vllm_sparse.pages.summaries.SUMMARIES`."""
    adaptive: ClassVar[bool] = False
    """Whether a row ends where its pages hold ``SparseConfig.decode_coverage`` of its estimated attention,
    before its budget; scores must then be estimates of true masses."""

    @abstractmethod
    def score(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        block_table: torch.Tensor,
        plan: DecodePlan,
        page_size: int,
        scale: float,
        scores: PageScores,
    ) -> None:
        """Write the score of every page to be scored: higher means attend, in units of log-mass.

        Args:
            q: [num_reqs, q_heads, head_dim], one query token per request.
            kv: [num_blocks, kv_heads, page_size + summary rows, 2 * head_dim].
            block_table: int32 [num_reqs, max_pages].
            plan: rows with ``score_offsets >= 0`` are to be scored, from that column on.
            page_size: tokens per page.
            scale: softmax scale.
            scores: where to write; kernels do so through :mod:`vllm_sparse.kernels.store_scores`.
        """

"""SparseMetadata: what a step's attention needs, built once per step and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_sparse.decode.attend import DecodeRows
from vllm_sparse.pages.decode_plan import EXACT
from vllm_sparse.prefill.runs import PrefillRun


@dataclass(frozen=True)
class Step:
    """vLLM's metadata of a step, split: decode rows first, a request each with its last token and the drafts after
    it, prefill rows after them."""

    common: Any
    num_decodes: int
    num_prefills: int
    num_decode_tokens: int
    asked_tokens: list[int] = field(default_factory=list)
    """Of each request: the budget that it asks for, ``EXACT``, or 0; empty where none asks for anything."""
    prompts: np.ndarray | None = None
    """Which rows are prompt tokens: bool, perhaps without padding; None where that is not known."""

    def is_exact(self, request: int) -> bool:
        """Whether a request wants exact attention; padding does not."""
        return request < len(self.asked_tokens) and self.asked_tokens[request] == EXACT

    @property
    def has_drafts(self) -> bool:
        """Whether decode rows have more than one token."""
        return self.num_decode_tokens > self.num_decodes


@dataclass
class SparseMetadata:
    """One step. Decode rows come first, prefill rows after them."""

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    query_start_loc: torch.Tensor
    """int32 [num_reqs + 1]."""
    seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens, this step's included; 0 for padding."""
    block_table: torch.Tensor
    """int32 [num_reqs, max_pages]; entries past a request's last page are stale."""
    slot_mapping: torch.Tensor

    decodes: DecodeRows
    """Decode rows that attend over chosen pages."""
    dense_short: Any = None
    """Metadata of the dense backend for decode rows with lengths ``decodes.plan.dense_seq_lens``, None where the
    page table takes them all."""
    prefill: list[PrefillRun] = field(default_factory=list)
    """All prefill rows, in the order in which sparse layers attend them."""
    dense_all: Any = None
    """Metadata of the dense backend for every row: what dense layers run. None with offload, which has none."""

    @property
    def mm_prefix_range(self) -> None:
        """Where vLLM's backends keep the ranges of images, whose tokens attend to later ones.

        Gemma 4 sets it to None in the metadata of its full layers, which are causal there, too: so they become in
        what the dense backend has.
        """
        return None

    @mm_prefix_range.setter
    def mm_prefix_range(self, ranges: None) -> None:
        for rows in (self.dense_all, *(run.dense for run in self.prefill)):
            for name in ("mm_prefix_range", "mm_prefix_range_tensor", "mm_prefix_query_range_tensor"):
                if hasattr(rows, name):
                    setattr(rows, name, ranges)

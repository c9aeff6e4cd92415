"""SparseMetadata: what a step's attention needs, built once per step and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.offload.contexts import ContextRun
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import QueryBlocks


@dataclass
class SparseMetadata:
    """One step. Decode rows (one query token each) come first, prefill rows after them."""

    num_actual_tokens: int
    num_decodes: int
    query_start_loc: torch.Tensor
    """int32 [num_reqs + 1]."""
    seq_lens: torch.Tensor
    """int32 [num_reqs]: context tokens, this step's included; 0 for padding."""
    block_table: torch.Tensor
    """int32 [num_reqs, max_pages]; entries past a request's last page are stale."""
    slot_mapping: torch.Tensor

    plan: DecodePlan
    table: PageTable
    scores: PageScores

    monitor: RecallMonitor | None = None
    """Measures what the chosen pages hold, where the config asks for it."""
    dense_all: Any = None
    """Metadata of the dense backend for every row: what dense layers run."""
    dense_prefill: Any = None
    """The same for prefill rows alone, None where none is dense; those in ``chunks`` have length 0."""
    chunks: list[QueryBlocks] = field(default_factory=list)
    """Prefill rows that attend over chosen pages."""
    runs: list[ContextRun] = field(default_factory=list)
    """Offload: all prefill rows, dense or not, in place of ``dense_prefill`` and ``chunks``."""
    dense_short: Any = None
    """The same for decode rows with lengths ``plan.dense_seq_lens``, None where the table takes them."""

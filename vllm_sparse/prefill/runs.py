"""PrefillRun: prefill rows of a step that are attended together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse.pages.query_blocks import QueryBlocks


@dataclass(kw_only=True)
class PrefillRun:
    """Dense rows of one or more requests, or the chunk of one request that chooses pages: exactly one of
    ``dense``, ``chunk`` and ``look`` is set."""

    tokens: slice
    """Its queries among the step's tokens."""
    block_table: torch.Tensor
    """int32 [requests, max_pages]."""
    dense: Any = None
    """Metadata of the dense backend for these rows."""
    chunk: QueryBlocks | None = None
    """Queries that choose pages; its ``request`` is a row of ``block_table``."""
    look: QueryBlocks | None = None
    """Queries of a dense run, of which some layers count what they would choose."""

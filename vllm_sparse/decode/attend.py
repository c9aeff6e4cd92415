"""SparseDecode: the pages that decode rows attend to, chosen from scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection
from vllm_sparse.policies.base import DecodePolicy


@dataclass
class DecodeRows:
    """Decode rows of a step, a request each; planned once, chosen for by every layer in turn."""

    block_table: torch.Tensor
    """int32 [num_decodes, max_pages]."""
    plan: DecodePlan
    table: PageTable
    """The pages that a layer has chosen."""
    scores: PageScores
    monitor: RecallMonitor | None = None
    """Measures what the chosen pages hold, where the config asks for it."""


@dataclass
class SparseDecode:
    """Policy and selection of a layer."""

    policy: DecodePolicy
    selection: Selection
    geometry: Geometry
    layer_index: int

    def choose(self, q: torch.Tensor, scored: torch.Tensor, listed: torch.Tensor, rows: DecodeRows) -> None:
        """Write the pages to attend to ``rows.table``, as head pages of ``listed``.

        Args:
            q: [num_tokens, q_heads, head_dim], those of ``rows.plan.queries``.
            scored: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim], what policies read.
            listed: [num_blocks, kv_heads, page_size or more, 2 * head_dim], the cache that holds K and V.
            rows: of the step.
        """
        run, block_table = kernels.for_device(q.device), rows.block_table
        self.policy.score(q, scored, block_table, rows.plan, self.geometry, rows.scores)
        run.select_pages(rows.scores, block_table, rows.plan, listed, self.selection, rows.table)
        if rows.monitor is not None and self.layer_index in rows.monitor.measured:
            run.recall_mass(
                q, scored, block_table, rows.plan, rows.table, self.geometry, rows.monitor, self.layer_index
            )

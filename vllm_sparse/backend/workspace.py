"""Device buffers of sparse steps, allocated while vLLM measures what the model needs.

Anything allocated after vLLM has sized its KV pool is memory it does not know of. Layers are built
before that, so the first layer allocates for all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import max_decode_query_len

from vllm_sparse.config import SparseConfig
from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.pages.decode_plan import DecodePlan, segment_pages
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.prefill.buffers import PrefillBuffers
from vllm_sparse.prefill.gate import ChunkGate

logger = logging.getLogger("vllm.vllm_sparse")

SCORE_BYTES = 64 << 20
"""Score buffers end here: 16.7 million (query head, page) scores, many times what a GPU's KV cache
holds without prefix sharing. Rows that do not fit in a step run dense in that step."""


@dataclass
class Workspace:
    """Buffers shared by all layers of equal head counts; rows are decode requests."""

    plan: DecodePlan
    table: PageTable
    scores: PageScores
    page_size: int
    max_pages: int
    """Pages of the longest context, one spare."""
    query_tokens: int = 1
    """Most query tokens of a decode row: one, and as many drafts as the engine verifies."""
    budgets_asked: bool = False
    """Whether the plan has budgets that rows of the last step asked for, which the next one must wipe out."""
    prefill: PrefillBuffers | None = None
    """None where prefill is dense."""
    gate: ChunkGate | None = None
    """Beside ``prefill``."""
    monitor: RecallMonitor | None = None
    """None where ``recall_monitor_every_steps`` is 0."""
    rehearsed: dict[torch.dtype, int] = field(default_factory=dict)
    """Tokens of the largest step whose calls were rehearsed (:mod:`vllm_sparse.backend.rehearsal`), by the dtype
    of their cache: layers may be left out of a quantised one."""

    def fits(self, page_size: int, q_heads: int, kv_heads: int) -> bool:
        """Whether layers of this shape can share these buffers."""
        return (self.page_size, self.scores.q_heads, self.kv_heads) == (page_size, q_heads, kv_heads)

    @property
    def rehearsed_tokens(self) -> int:
        """Tokens of the largest step that was rehearsed for every dtype."""
        return min(self.rehearsed.values(), default=0)

    @property
    def kv_heads(self) -> int:
        return self.table.lengths.shape[0] // self.plan.table_seq_lens.shape[0]

    @classmethod
    def allocate(
        cls,
        vllm_config,
        config: SparseConfig,
        page_size: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> Workspace:
        """Buffers for the largest batch and context that vLLM may schedule."""
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # Batches are padded up to the sizes that CUDA graphs were captured for.
        max_num_reqs = max(max_num_reqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        max_pages = -(-vllm_config.model_config.max_model_len // page_size) + 1
        capacity = max(16 * max_pages, SCORE_BYTES // (4 * q_heads))
        capacity = min(capacity, max_num_reqs * max_pages)
        # Dense decode chooses from nothing.
        chosen = 1 if config.decode_policy == "dense" else config.largest_pages(page_size)
        segment = segment_pages(max_pages, chosen)
        workspace = cls(
            plan=DecodePlan.empty(max_num_reqs, device, segment),
            table=PageTable.empty(max_num_reqs, kv_heads, min(config.table_pages(page_size), max_pages), device),
            scores=PageScores.empty(q_heads, capacity, max_num_reqs, device),
            page_size=page_size,
            max_pages=max_pages,
            query_tokens=max_decode_query_len(vllm_config),
        )
        if config.prefill_policy != "dense":
            workspace.prefill = PrefillBuffers.allocate(
                q_heads, head_dim, page_size, vllm_config.model_config.max_model_len,
                vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.dtype, device,
            )  # fmt: skip
            workspace.gate = ChunkGate(workspace.prefill)
        if config.recall_monitor_every_steps:
            layers = vllm_config.model_config.hf_text_config.num_hidden_layers
            workspace.monitor = RecallMonitor.allocate(
                config.recall_monitor_every_steps, layers, q_heads, kv_heads, device
            )
        mib = (workspace.scores.values.numel() + workspace.table.head_pages.numel()) * 4 / 2**20
        if workspace.prefill is not None:
            mib += workspace.prefill.num_bytes / 2**20
        logger.info("sparse attention: workspace of %.0f MiB for up to %d requests", mib, max_num_reqs)
        return workspace

"""Residency: where K and V of a layer are, on the GPU or on the host, behind one interface.

=================  ==================================  ===========================================================
                   resident                            offload
=================  ==================================  ===========================================================
vLLM's cache       pages: K, V and summaries           summaries
a step writes      into it                             through staging pages to the host (``offload/store.py``)
a prefill run      reads it                            reads contexts that were copied into a buffer
a decode row       reads chosen pages of it            brings chosen head pages into the hot set
a dense row        reads it                            reads the host in place
=================  ==================================  ===========================================================

A layer has one :class:`LayerPages`, a metadata builder one :class:`StepRows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_sparse import kernels
from vllm_sparse.attention import DECODE_ORDER, OFFLOAD_ORDER
from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.backend import dense, prefill_rows
from vllm_sparse.backend.metadata import SparseMetadata, Step
from vllm_sparse.backend.spec import PageLayout
from vllm_sparse.backend.workspace import Workspace
from vllm_sparse.config import SparseConfig
from vllm_sparse.offload.store import OffloadedLayer
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import summaries_as_pages
from vllm_sparse.prefill.runs import PrefillRun

SHORT_ROWS_DENSE_FROM = 16
"""Decode batches of this size on run the dense backend beside the sparse kernel for short rows: it
reads short contexts faster than a page table does, and in smaller batches costs more than it saves."""


class LayerPages(ABC):
    """The pages of one layer; ``cache`` in each method is what vLLM gives it."""

    kernel_order: ClassVar[tuple[str, ...]]
    """What ``attention_kernel: auto`` tries for decode."""

    def __init__(self, layout: PageLayout, geometry: Geometry, cache_dtype: torch.dtype):
        self.layout, self.geometry, self.item_bytes = layout, geometry, cache_dtype.itemsize

    @property
    def cache_slots(self) -> int:
        """Slots of a page in vLLM's cache."""
        return self.layout.page_slots(self.geometry.page_size, self.geometry.head_dim, self.item_bytes)

    @property
    @abstractmethod
    def prefill_slots(self) -> int:
        """Slots of the pages that a prefill run reads."""

    @property
    def ready(self) -> bool:
        """Whether there is something to write to and to attend to."""
        return True

    def unreadable(self, cache: torch.Tensor, attention: list[AttentionKernel]) -> str | None:
        """Why the kernels of ``attention`` cannot read ``cache``, whose pages have the right slots; or None."""
        return None

    @abstractmethod
    def write(
        self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write K and V of new tokens and refresh the summaries of the pages they touch.

        Args:
            key, value: [num_tokens, kv_heads, head_dim].
            slot_mapping: int64 [num_tokens], ``block * page_size + token slot``; -1: not written.
        """

    @abstractmethod
    def of_run(self, cache: torch.Tensor, runs: list[PrefillRun], index: int) -> torch.Tensor:
        """The pages that ``runs[index]`` names: [pages, kv_heads, prefill_slots, 2 * head_dim]."""

    @abstractmethod
    def scored(self, cache: torch.Tensor) -> torch.Tensor:
        """Pages as decode policies read them: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim]."""

    @abstractmethod
    def listed(self, cache: torch.Tensor) -> torch.Tensor:
        """K and V of all blocks: the cache whose head pages decode selection lists."""

    @abstractmethod
    def attend_chosen(
        self, attention: AttentionKernel, query: torch.Tensor, cache: torch.Tensor, md: SparseMetadata,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attend decode rows over the pages in ``md.decodes.table``."""

    @abstractmethod
    def attend_short(
        self, attention: AttentionKernel, backend: Any, layer: Any, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, cache: torch.Tensor, md: SparseMetadata, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attend decode rows that are dense over their whole contexts; ``backend`` is the dense one."""


class ResidentPages(LayerPages):
    """All of a layer's pages in vLLM's cache."""

    kernel_order = DECODE_ORDER

    @property
    def prefill_slots(self) -> int:
        return self.cache_slots

    def unreadable(self, cache, attention):
        reasons = (kernel.unreadable(cache, self.geometry.page_size) for kernel in attention)
        return next((reason for reason in reasons if reason), None)

    def write(self, key, value, cache, slot_mapping):
        kernels.for_device(key.device).page_write(
            key, value, cache, slot_mapping, self.geometry.page_size, self.layout.summary,
            self.geometry.k_scale, self.geometry.v_scale,
        )  # fmt: skip

    def of_run(self, cache, runs, index):
        return cache

    def scored(self, cache):
        return cache

    def listed(self, cache):
        return cache

    def attend_chosen(self, attention, query, cache, md, output):
        attention.attend_rows(query, cache, md.decodes.table, self.geometry, output)

    def attend_short(self, attention, backend, layer, query, key, value, cache, md, output):
        backend.attend(layer, query, key, value, cache, md.dense_short, output)


class OffloadedPages(LayerPages):
    """K and V of a layer on the host, summaries in vLLM's cache."""

    kernel_order = OFFLOAD_ORDER
    offloaded: OffloadedLayer | None = None
    """This layer's part of the offload store, from the time that vLLM has settled on its blocks. Before, graphs
    are captured to see what they take."""

    @property
    def prefill_slots(self) -> int:
        return self.geometry.page_size  # contexts are read back without summaries

    @property
    def ready(self) -> bool:
        return self.offloaded is not None

    def _summaries(self, cache):
        """``cache`` without slots that only make room for states."""
        slots = self.layout.summary_slots(self.geometry.page_size, self.geometry.head_dim, self.item_bytes)
        return cache[:, :, :slots]

    def write(self, key, value, cache, slot_mapping):
        if self.ready:
            summaries = self._summaries(cache)
            self.offloaded.write(key, value, slot_mapping, summaries, self.layout.summary, self.geometry)

    def of_run(self, cache, runs, index):
        return self.offloaded.context_of(runs, index)

    def scored(self, cache):
        return summaries_as_pages(self._summaries(cache), self.geometry.page_size)

    def listed(self, cache):
        return self.offloaded.host

    def attend_chosen(self, attention, query, cache, md, output):
        self.offloaded.bring(md.decodes.table)
        self.offloaded.attend(attention, query, md.decodes.table, self.geometry, output)

    def attend_short(self, attention, backend, layer, query, key, value, cache, md, output):
        if self.offloaded.exponents is None:
            backend.attend(layer, query, key, value, self.offloaded.host, md.dense_short, output)
        else:  # no dense backend reads codes
            rows = md.decodes
            self.offloaded.attend_whole(attention, query, rows.block_table, rows.plan, self.geometry, output)


@dataclass
class StepRows(ABC):
    """Plans the rows of a step that do not go through the decode page table."""

    config: SparseConfig
    workspace: Workspace
    dense: dense.DenseBuilder
    layer: Any
    """The first one of the builder's, for its attention kernel and its sparse prefill."""

    @abstractmethod
    def dense_all(self, step: Step, fast_build: bool) -> Any:
        """Metadata of the dense backend for every row: what dense layers run."""

    @abstractmethod
    def prefill(self, step: Step, fast_build: bool) -> list[PrefillRun]:
        """All prefill rows of the step, in the order in which they are attended."""

    @abstractmethod
    def dense_decodes(self, step: Step) -> tuple[bool, bool]:
        """Whether rows of short contexts run dense, and whether the dense backend runs beside the page table.

        That backend also takes rows that cannot be scored, and prompt tokens where the attention kernel does not.
        """


class ResidentRows(StepRows):
    """Steps over resident pages: dense rows of a prefill together, then its chunks."""

    def dense_all(self, step, fast_build):
        return self.dense.build("all", step.common, fast_build)

    def prefill(self, step, fast_build):
        common, decodes = step.common, step.num_decodes
        chunks, looks = prefill_rows.sparse_chunks(step, self.config, self.workspace.gate, can_look=True)
        table, runs = common.block_table_tensor, []
        if len(chunks) < step.num_prefills:
            rows = dense.prefill_rows(common, decodes, step.num_decode_tokens) if decodes else common
            metadata = self.dense.build("prefill", prefill_rows.dense_rows(rows, chunks, decodes), fast_build)
            tokens = slice(step.num_decode_tokens, common.num_actual_tokens)
            runs.append(PrefillRun(tokens=tokens, block_table=table[decodes:], dense=metadata))
        # After the dense rows: a dense backend may write zeros for rows of length 0.
        runs += [PrefillRun(tokens=chunk.tokens(), block_table=table, chunk=chunk) for chunk in chunks]
        return runs + [PrefillRun(tokens=chunk.tokens(), block_table=table, look=chunk) for chunk in looks]

    def dense_decodes(self, step):
        reads_all = step.has_drafts or self.layer.attention.reads_unlisted_rows
        from_table = self.config.decode_policy != "dense" and reads_all
        beside = step.num_decodes >= SHORT_ROWS_DENSE_FROM or not from_table
        return beside, beside


class OffloadedRows(StepRows):
    """Steps over offloaded pages: a prefill in runs whose contexts fit a buffer, decode rows sparse if at all
    possible."""

    def dense_all(self, step, fast_build):
        return None

    def prefill(self, step, fast_build):
        return prefill_rows.context_runs(
            step, self.config, self.workspace.page_size, self.workspace.max_pages, self.dense, self.layer.prefill,
            self.workspace.gate,
        )  # fmt: skip

    def dense_decodes(self, step):
        # Dense rows would read all of their contexts from the host: only those that cannot be scored.
        return False, step.num_decodes * self.workspace.max_pages > self.workspace.scores.capacity_pages

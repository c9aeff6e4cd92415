"""OffloadStore: everything that a rank keeps of its KV cache beside vLLM's blocks, in offload mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.offload.contexts import ContextReader, ContextRun
from vllm_sparse.offload.pool import HostPool
from vllm_sparse.offload.sizing import CacheShape, Split, StepLimits
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.hot_set import HotSet, Lookups
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan

MOST_IN_PLACE = 1 << 22
"""Head pages that are read on the host by one launch where whole contexts are: what its page table holds."""


class OffloadStore:
    """The host pool, the hot store on the GPU, and what finds head pages in it.

    The hot store is one tensor of pages like those of a resident cache. Its first pages are the ones that a
    step writes to, shared by all layers; after them each layer has its slots. So ``page_write`` and every
    attention kernel work on it as they do on vLLM's own cache.
    """

    def __init__(
        self, shape: CacheShape, limits: StepLimits, split: Split, dtype: torch.dtype, device: torch.device
    ):
        self.shape, self.num_pages = shape, split.num_blocks * shape.block_pages
        self.slots_per_layer = split.slots_per_layer
        self.pool = HostPool(shape, self.num_pages, dtype, device)
        staged = limits.staged_pages(shape.page_size)
        pages = staged - (-shape.layers * split.slots_per_layer // shape.kv_heads)
        rows = shape.page_size + shape.summary_slots
        self.hot = torch.zeros(pages, shape.kv_heads, rows, 2 * shape.head_dim, dtype=dtype, device=device)
        self.plan = WritePlan.empty(limits.max_num_tokens, staged, shape.layers, device)
        head_pages = limits.max_num_reqs * shape.kv_heads * limits.table_pages
        self.lookups = Lookups.empty(head_pages, device)
        head_pages = (self.num_pages, shape.kv_heads, 2)
        exponents = [
            torch.zeros(head_pages, dtype=torch.uint8, device=device) if shape.has_exponents else None
            for _ in range(shape.layers)
        ]
        self.contexts = ContextReader(limits.context_pages(shape.page_size), self.pool.layers, self.hot, exponents)
        self.layers = [
            OffloadedLayer(
                self, index, self.pool.layers[index], self._hot_set_of(index, staged, device), exponents[index]
            )
            for index in range(shape.layers)
        ]

    def _hot_set_of(self, layer: int, staged_pages: int, device: torch.device) -> HotSet:
        heads, slots = self.shape.kv_heads, self.slots_per_layer
        return HotSet.empty(self.num_pages * heads, slots, staged_pages * heads + layer * slots, device)


@dataclass
class OffloadedLayer:
    """One layer of the store."""

    store: OffloadStore
    index: int
    host: torch.Tensor
    """[num_pages, kv_heads, page_size, 2 * head_dim]: K and V of all pages."""
    hot_set: HotSet
    exponents: torch.Tensor | None
    """uint8 [num_pages, kv_heads, 2], on the GPU, of a host in e4m3: a link to the host moves codes alone."""

    @property
    def hot(self) -> torch.Tensor:
        return self.store.hot

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        summaries: torch.Tensor,
        summary: str,
        geometry: Geometry,
    ) -> None:
        """Write K and V of new tokens through to the host, and the summaries of their pages.

        Args:
            key, value: [num_tokens, kv_heads, head_dim].
            slot_mapping: int64 [num_tokens], ``page * page_size + row``; -1: not written.
            summaries: [num_pages, kv_heads, summary slots, 2 * head_dim], vLLM's cache of this layer.
            summary: see :mod:`vllm_sparse.kernels.page_write`.
            geometry: of the layer, with the scales of a quantised cache.
        """
        store, run, num_tokens = self.store, kernels.for_device(key.device), slot_mapping.shape[0]
        if num_tokens == 0:
            return
        page_size = store.shape.page_size
        if self.index == 0:
            run.plan_writes(slot_mapping, page_size, store.plan)
        run.stage_pages(self.host, summaries, store.plan, num_tokens, store.hot, self.exponents)
        run.page_write(
            key, value, store.hot, store.plan.staged_slots[:num_tokens], page_size, summary, geometry.k_scale,
            geometry.v_scale,
        )  # fmt: skip
        run.write_through(store.hot, store.plan, num_tokens, self.host, summaries, self.hot_set, self.exponents)

    def bring(self, table: PageTable) -> None:
        """Turn the chosen head pages of ``table`` into places in the hot store, fetching those that it lacks.

        A head page for which there is no slot becomes ``~head_page``: the attention kernel reads it on the host.
        """
        store, run = self.store, kernels.for_device(table.head_pages.device)
        run.find_hot_slots(
            table, store.shape.kv_heads, store.shape.page_size, store.plan, self.index, self.hot_set,
            store.lookups,
        )  # fmt: skip
        run.fetch_head_pages(
            self.host, table, store.plan, self.index, self.hot_set, store.lookups, store.hot, self.exponents,
        )  # fmt: skip

    def context_of(self, runs: list[ContextRun], index: int) -> torch.Tensor:
        """The contexts of ``runs[index]`` on the GPU: [pages, kv_heads, page_size, 2 * head_dim]."""
        return self.store.contexts.open(self.index, runs, index)

    def attend(
        self, attention: AttentionKernel, q: torch.Tensor, table: PageTable, geometry: Geometry, out: torch.Tensor
    ) -> None:
        """Attend over ``table``, whose head pages are in the hot store, or ``~head_page`` of the host.

        Args:
            q, out: [num_tokens, q_heads, head_dim], those of ``table.queries``.
        """
        attention.attend_rows(q, self.hot, table, geometry, out, self.host, self.exponents)

    def attend_whole(
        self,
        attention: AttentionKernel,
        q: torch.Tensor,
        block_table: torch.Tensor,
        plan: DecodePlan,
        geometry: Geometry,
        out: torch.Tensor,
    ) -> None:
        """Attend over every page of a context, on the host in place.

        Args:
            q, out: [num_tokens, q_heads, head_dim], those of ``plan.queries``.
            block_table: int32 [num_reqs, max_pages].
            plan: of the step; rows whose ``dense_seq_lens`` are 0 leave ``out`` untouched.
        """
        kv_heads = geometry.kv_heads
        heads = torch.arange(kv_heads, dtype=torch.int32, device=q.device)
        requests = max(1, MOST_IN_PLACE // (kv_heads * block_table.shape[1]))
        num_reqs, one_each = len(block_table), plan.queries.starts is None
        for rows in (slice(at, min(at + requests, num_reqs)) for at in range(0, num_reqs, requests)):
            # ~(block * kv_heads + head), without a copy of it.
            head_pages = block_table[rows, None, :] * -kv_heads + ~heads[:, None]
            lengths = plan.dense_seq_lens[rows, None].expand(-1, kv_heads)
            queries = plan.queries.of_requests(rows)
            table = PageTable(head_pages.flatten(0, 1), lengths.flatten(), queries=queries)
            tokens = rows if one_each else slice(None)  # by their starts kernels find those of the part
            self.attend(attention, q[tokens], table, geometry, out[tokens])

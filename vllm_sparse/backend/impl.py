"""SparseImpl: one attention layer. Policies and kernels do the work."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_sparse import kernels, metrics
from vllm_sparse.attention import DECODE_ORDER, OFFLOAD_ORDER, PREFILL_ORDER, choose_kernel
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.backend import dense
from vllm_sparse.backend.metadata import SparseMetadata
from vllm_sparse.backend.rehearsal import MOST_IN_PLACE, Rehearsal
from vllm_sparse.backend.workspace import Workspace
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.store import OffloadedLayer
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.layout import summaries_as_pages, unreadable
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.summaries import summary_slots
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.prefill.attend import SparsePrefill
from vllm_sparse.prefill.buffers import PrefillBuffers
from vllm_sparse.prefill.patterns import PatternTable
from vllm_sparse.support import Decision, Treatment, layer_number

logger = logging.getLogger("vllm.vllm_sparse")


class SparseImpl(AttentionImpl[SparseMetadata]):
    """Writes pages with their summaries, attends sparse rows over chosen pages, the rest densely."""

    supports_dcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **optional,
    ) -> None:
        """As vLLM calls it, with ``optional`` arguments that ``support`` found absent; :meth:`settle` is next."""
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale, self.kv_cache_dtype = head_size, float(scale), kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.device = torch.device(current_platform.device_type)
        self.dtype = torch.get_default_dtype()
        self.cache_dtype = self.dtype if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype)
        self.offloaded: OffloadedLayer | None = None
        """This layer's part of the offload store, from the time that vLLM has settled on its blocks."""

    def settle(
        self,
        vllm_config,
        name: str,
        decision: Decision,
        summary: str,
        stock: type,
    ) -> None:
        """Take what vLLM does not tell a constructor, and share or allocate the buffers of a step.

        Args:
            name: of the layer.
            decision: sparse or dense, and why.
            summary: what its pages store beside K and V.
            stock: the backend that vLLM would have chosen.

        Raises:
            ConfigError: offload, and this layer would read its whole context from the host in every step.
        """
        self.config = SparseConfig.from_vllm(vllm_config)
        self.name, self.decision, self.summary = name, decision, summary
        self.layer_index = layer_number(name)
        self.policy = DECODE_POLICIES[self.config.decode_policy]
        self.stock_impl = self.stock_backend = None
        if self.device.type != "cpu":
            self.stock_backend = dense.reader_of_pages(stock, self.dtype, self.head_size)
            self.stock_impl = self.stock_backend.get_impl_cls()(
                self.num_heads, self.head_size, self.scale, self.num_kv_heads, None, None, self.kv_cache_dtype,
                None, self.attn_type, self.kv_sharing_target_layer_name,
            )  # fmt: skip
        if self.config.offload is not None and decision.treatment is not Treatment.SPARSE:
            raise ConfigError(
                f"sparse.offload: layer {name} of this model would run dense ({decision.reason}), over its whole "
                f"context on the host; allowed: models all of whose layers run sparse"
            )
        self.counts = self._share_counts(vllm_config)
        # Pages of the default size are assumed where vLLM has not settled on one yet; the builder asks again.
        self.workspace: Workspace | None = None
        self.share_workspace(vllm_config, vllm_config.cache_config.block_size or 16)

    @property
    def is_sparse(self) -> bool:
        return self.decision.treatment is Treatment.SPARSE

    @staticmethod
    def _impls(vllm_config) -> list[SparseImpl]:
        """The layers of an engine that run in this backend, in their order."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        return [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), SparseImpl)]

    def _share_counts(self, vllm_config) -> metrics.EngineCounts:
        made = (getattr(impl, "counts", None) for impl in self._impls(vllm_config))
        return next((counts for counts in made if counts is not None), None) or metrics.EngineCounts(self.device)

    def share_workspace(self, vllm_config, page_size: int) -> None:
        """Take the buffers of another layer of this shape, or allocate some."""
        for impl in self._impls(vllm_config):
            made = getattr(impl, "workspace", None)
            if made is not None and made.fits(page_size, self.num_heads, self.num_kv_heads):
                self.workspace = made
                break
        else:
            self.workspace = Workspace.allocate(
                vllm_config, self.config, page_size, self.num_heads, self.num_kv_heads, self.head_size, self.device
            )
        if self.is_sparse:
            self.counts.follow(self.workspace.prefill, self.workspace.monitor)

    @classmethod
    def first(cls, vllm_config, workspace: Workspace | None = None) -> SparseImpl | None:
        """The first sparse layer of an engine, or of those that share ``workspace``; its builder counts steps."""
        impls = (impl for impl in cls._impls(vllm_config) if impl.is_sparse)
        return next((impl for impl in impls if workspace is None or impl.workspace is workspace), None)

    def page_slots(self) -> int:
        """Rows of a page in the cache that vLLM gives this layer."""
        rows = summary_slots(
            self.summary, self.page_size, self.head_size, self.cache_dtype.itemsize,
            least=int(self.config.offload is not None),
        )  # fmt: skip
        return rows if self.config.offload is not None else self.page_size + rows

    def unreadable(self, kv_cache: torch.Tensor) -> str | None:
        """Why this layer's kernels cannot work on the cache that vLLM has laid out, or None if they can."""
        reason = unreadable(kv_cache, self.page_slots())
        if reason is None and self.config.offload is None and self.is_sparse:
            reason = self.attention.unreadable(kv_cache, self.page_size)
            reason = reason or self.prefill_attention.unreadable(kv_cache, self.page_size)
        return reason

    def bind(self, position: int, page_size: int) -> None:
        """Settle what is known only once the KV cache is planned; called by the metadata builder, perhaps twice.

        ``position``: among its builder's layers, for layers whose names have no number.
        """
        self.page_size = page_size
        if self.layer_index is None:
            self.layer_index = position
        self.kernels = kernels.for_device(self.device)
        self.bind_budget()
        self._choose_attention(page_size)
        if self.stock_impl is None:
            self.dense = dense.TorchDense(self.scale, page_size)
        else:
            self.dense = dense.StockDense(self.stock_impl, page_size)

    def _choose_attention(self, page_size: int) -> None:
        self.geometry = Geometry(self.num_heads, self.num_kv_heads, self.head_size, page_size, self.scale)
        asked, shape = self.config.attention_kernel, AttentionShape(self.device, self.dtype, self.geometry)
        order = DECODE_ORDER if self.config.offload is None else OFFLOAD_ORDER
        self.attention = choose_kernel(asked, shape, order)
        self.prefill_attention = choose_kernel(asked, shape, PREFILL_ORDER)

    def bind_budget(self) -> None:
        """Settle what selection keeps, from config and policy."""
        config, head_budget_pages = self.config, None
        if isinstance(config.head_budgets, BudgetTable):
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            pages = config.head_budget_pages(self.page_size, self.layer_index, rank, ranks, self.num_kv_heads)
            head_budget_pages = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self.selection = replace(config.selection(self.page_size), head_budget_pages=head_budget_pages)

    def bind_prefill(self, buffers: PrefillBuffers | None) -> None:
        """Settle how sparse chunks are attended; None where prefill is dense."""
        self.prefill = None
        if buffers is not None:
            self.prefill = SparsePrefill(
                self.config.new_prefill_policy(self.page_size, self._patterns()), self.prefill_attention, buffers,
                self.selection, self.geometry,
            )  # fmt: skip

    def _patterns(self) -> HeadPatterns:
        table, patterns = self.config.head_patterns, None
        if isinstance(table, PatternTable):
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            patterns = table.of_layer(self.layer_index, rank, ranks, self.num_heads)
            if patterns is None:
                logger.info("sparse attention: layer %d has no patterns of its own", self.layer_index)
        if patterns is None:
            return HeadPatterns.of([self.config.uniform_pattern] * self.num_heads, self.page_size, self.device)
        return HeadPatterns.of(patterns, self.page_size, self.device)

    def _prefill_slots(self) -> int:
        """Rows of the pages that prefill reads: with offload of contexts read back, without summaries."""
        return self.page_size if self.config.offload is not None else self.page_slots()

    def warm_up_prefill(self) -> None:
        """Compile the kernels of sparse prefill; layers of equal shape share them."""
        rows = self._prefill_slots()
        self.prefill.warm_up(self.num_kv_heads, rows, self.head_size, self.num_heads, self.dtype)

    def rehearse(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """Make the calls that allocate, while vLLM measures a step (:mod:`vllm_sparse.backend.rehearsal`)."""
        workspace = self.workspace
        if not self.is_sparse or len(query) <= workspace.rehearsed_tokens:
            return
        workspace.rehearsed_tokens = len(query)
        self.page_size = workspace.page_size
        self._choose_attention(self.page_size)
        shape = (1, self.num_kv_heads, self._prefill_slots(), 2 * self.head_size)
        kv = torch.zeros(shape, dtype=self.cache_dtype, device=query.device)
        kernels_of_steps = (self.attention, self.prefill_attention)
        Rehearsal(self.config, workspace, *kernels_of_steps, kv, self.geometry).run(query, output)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Write K and V of new tokens and refresh the summaries of the pages they touch."""
        if self.config.offload is not None:
            if self.offloaded is not None:
                self.offloaded.write(key, value, slot_mapping, kv_cache, self.summary)
            return
        self.kernels.page_write(key, value, kv_cache, slot_mapping, self.page_size, self.summary)

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            query, output: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size]; already in the cache.
            kv_cache: [num_blocks, num_kv_heads, page_size + summary slots, 2 * head_size]; the summary slots
                alone with offload.
            attn_metadata: None in profiling runs.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("the sparse backend does not quantise its output")
        if attn_metadata is None:
            if self.device.type != "cpu":
                self.rehearse(query, output)
            return output.zero_()
        if self.config.offload is not None:
            return self._attend_offloaded(layer, query, key, value, kv_cache, attn_metadata, output)
        md, decodes = attn_metadata, attn_metadata.num_decodes
        if not self.is_sparse:
            self.dense.attend(layer, query, key, value, kv_cache, md.dense_all, output)
            return output
        if md.dense_prefill is not None:
            rows = slice(decodes, md.num_actual_tokens)
            self.dense.attend(layer, query[rows], key[rows], value[rows], kv_cache, md.dense_prefill, output[rows])
        for chunk in md.chunks:
            # After the dense rows: a dense backend may write zeros for rows of length 0.
            self.prefill.attend(query, kv_cache, md.block_table, chunk, output)
        if decodes:
            query, output_rows = query[:decodes], output[:decodes]
            if md.dense_short is not None:
                self.dense.attend(
                    layer, query, key[:decodes], value[:decodes], kv_cache, md.dense_short, output_rows
                )
            self._decode(query, kv_cache, md, output_rows)
        return output

    def _decode(self, query, kv_cache, md: SparseMetadata, output) -> None:
        if self.config.decode_policy == "dense":
            return
        block_table = md.block_table[: md.num_decodes]
        self.policy.score(query, kv_cache, block_table, md.plan, self.geometry, md.scores)
        self.kernels.select_pages(md.scores, block_table, md.plan, kv_cache, self.selection, md.table)
        if md.monitor is not None and self.layer_index < len(md.monitor.sums):
            self.kernels.recall_mass(
                query, kv_cache, block_table, md.plan, md.table,
                self.geometry, md.monitor, self.layer_index,
            )  # fmt: skip
        self.attention.attend(query, kv_cache, md.table, self.geometry, output)

    def _attend_offloaded(
        self, layer, query, key, value, summaries, md: SparseMetadata, output: torch.Tensor
    ) -> torch.Tensor:
        """The same with K and V on the host: prefill reads contexts into buffers, decode the chosen head pages."""
        offloaded, decodes = self.offloaded, md.num_decodes
        if offloaded is None:  # graphs captured to see what they take, before there is a cache
            return output.zero_()
        for index, run in enumerate(md.runs):
            kv = offloaded.store.contexts.open(offloaded.index, md.runs, index)
            if run.chunk is not None:
                self.prefill.attend(query, kv, run.block_table, run.chunk, output)
            else:
                rows = run.tokens
                self.dense.attend(layer, query[rows], key[rows], value[rows], kv, run.dense, output[rows])
        if not decodes:
            return output
        query, out, block_table = query[:decodes], output[:decodes], md.block_table[:decodes]
        if md.dense_short is not None:
            if offloaded.exponents is None:
                self.dense.attend(
                    layer, query, key[:decodes], value[:decodes], offloaded.host, md.dense_short, out
                )
            else:
                self._attend_whole(query, block_table, md.plan.dense_seq_lens, out)
        pages = summaries_as_pages(summaries, self.page_size)
        self.policy.score(query, pages, block_table, md.plan, self.geometry, md.scores)
        self.kernels.select_pages(md.scores, block_table, md.plan, offloaded.host, self.selection, md.table)
        offloaded.bring(md.table)
        self._attend_on_host(query, md.table, out)
        return output

    def _attend_on_host(self, query: torch.Tensor, table: PageTable, out: torch.Tensor) -> None:
        offloaded = self.offloaded
        self.attention.attend(query, offloaded.hot, table, self.geometry, out, offloaded.host, offloaded.exponents)

    def _attend_whole(self, query, block_table: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor) -> None:
        """Rows that cannot be scored, where no dense backend can read the host: every page of them, in place."""
        heads = torch.arange(self.num_kv_heads, dtype=torch.int32, device=query.device)
        requests = max(1, MOST_IN_PLACE // (self.num_kv_heads * block_table.shape[1]))
        for rows in (slice(at, at + requests) for at in range(0, len(query), requests)):
            # ~(block * kv_heads + head), without a copy of it.
            head_pages = block_table[rows, None, :] * -self.num_kv_heads + ~heads[:, None]
            lengths = seq_lens[rows, None].expand(-1, self.num_kv_heads)
            self._attend_on_host(query[rows], PageTable(head_pages.flatten(0, 1), lengths.flatten()), out[rows])

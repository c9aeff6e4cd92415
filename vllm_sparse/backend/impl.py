"""SparseImpl: one attention layer. Policies and kernels do the work."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_sparse import metrics
from vllm_sparse.attention import PREFILL_ORDER, choose_kernel
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.backend import dense
from vllm_sparse.backend.metadata import SparseMetadata
from vllm_sparse.backend.rehearsal import Rehearsal
from vllm_sparse.backend.requests import RequestBudgets
from vllm_sparse.backend.residency import LayerPages, OffloadedPages, ResidentPages
from vllm_sparse.backend.spec import PageLayout
from vllm_sparse.backend.workspace import Workspace
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode.attend import SparseDecode
from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.layout import PAGE_SIZES, unreadable
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.prefill.attend import SparsePrefill
from vllm_sparse.prefill.patterns import PatternTable
from vllm_sparse.support import QUANTISED_CACHES, Decision, Treatment, layer_number

logger = logging.getLogger("vllm.vllm_sparse")


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


class KVScales(NamedTuple):
    """What a layer's K, V and queries are divided by where they are in 8 bits."""

    k: float = 1.0
    v: float = 1.0
    q: float = 1.0


class SparseImpl(AttentionImpl[SparseMetadata]):
    """Writes pages with their summaries, attends sparse rows over chosen pages, the rest densely.

    A layer comes to life in the stages in which vLLM gets to know it:

    1. ``__init__``, by vLLM: heads, sizes and dtypes.
    2. :meth:`settle`, by our hook right after it: what ``support`` decided, and the buffers of a step.
    3. :meth:`rehearse`, in vLLM's profiling run on a GPU: kernels, and what a step allocates beside these buffers.
    4. :meth:`bind`, by the metadata builder, once the KV cache is planned and perhaps twice: the size of pages,
       and by :meth:`configure` what is chosen of them.
    5. With offload, ``backend/offload.py`` gives ``pages`` its part of the store.

    In each step vLLM calls :meth:`do_kv_cache_update` and then :meth:`forward`.
    """

    supports_dcp = False

    # Stages 1 to 4

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
        """Arguments are vLLM's; ``support`` has found those that are not read here, ``optional`` too, absent."""
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale, self.kv_cache_dtype = head_size, float(scale), kv_cache_dtype
        self.soft_cap, self.sink_logits = float(logits_soft_cap or 0), optional.get("sinks")
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.device = torch.device(current_platform.device_type)
        self.dtype = torch.get_default_dtype()
        if kv_cache_dtype in QUANTISED_CACHES:
            self.cache_dtype = torch.float8_e4m3fn
        else:
            self.cache_dtype = self.dtype if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype)
        self.scales = KVScales()
        self.workspace: Workspace | None = None
        self.looks = False
        """Whether it counts what dense chunks would keep, if the gate of prefill wants to know."""

    def settle(self, vllm_config, name: str, decision: Decision, layout: PageLayout, stock: type | None) -> None:
        """Take what vLLM does not tell a constructor, and share or allocate the buffers of a step.

        Args:
            name: of the layer.
            decision: sparse or dense, and why.
            layout: of its pages.
            stock: the backend that vLLM would have chosen; None on a CPU.
        """
        self.config = SparseConfig.from_vllm(vllm_config)
        self.name, self.decision, self.layout = name, decision, layout
        self.layer_index = layer_number(name)
        self.stock_impl = self.stock_backend = None
        if stock is not None:
            self.stock_backend = dense.reader_of_pages(
                stock, self.dtype, self.head_size, self.kv_cache_dtype, vllm_config.model_config.is_mm_prefix_lm
            )
            self.stock_impl = self.stock_backend.get_impl_cls()(
                self.num_heads, self.head_size, self.scale, self.num_kv_heads, None, None, self.kv_cache_dtype,
                self.soft_cap or None, self.attn_type, self.kv_sharing_target_layer_name,
                **({} if self.sink_logits is None else {"sinks": self.sink_logits}),
            )  # fmt: skip
        others = [impl for impl in self._impls(vllm_config) if hasattr(impl, "counts")]
        self.counts = others[0].counts if others else metrics.EngineCounts(self.device)
        self.requests = others[0].requests if others else RequestBudgets()
        # Pages of the default size are assumed where vLLM has not settled on one yet; ``bind`` asks again.
        self._fit(vllm_config, layout.page_size or vllm_config.cache_config.block_size or PAGE_SIZES[0])

    def _fit(self, vllm_config, page_size: int) -> None:
        """Take what depends on the size of pages alone: buffers, another layer's if they fit."""
        fitting = (
            impl.workspace
            for impl in self._impls(vllm_config)
            if impl.workspace is not None and impl.workspace.fits(page_size, self.num_heads, self.num_kv_heads)
        )
        self.workspace = next(fitting, None) or Workspace.allocate(
            vllm_config, self.config, page_size, self.num_heads, self.num_kv_heads, self.head_size, self.device
        )
        if self.is_sparse:
            self.counts.follow(self.workspace.prefill, self.workspace.monitor)
        geometry = Geometry(
            self.num_heads, self.num_kv_heads, self.head_size, page_size, self.scale,
            soft_cap=self.soft_cap, sink_logits=self.sink_logits,
        )  # fmt: skip
        self.geometry = geometry.quantised(*self.scales) if self.is_quantised else geometry
        kind = OffloadedPages if self.layout.on_host else ResidentPages
        self.pages: LayerPages = kind(self.layout, self.geometry, self.cache_dtype)
        self.attention = self.prefill_attention = None
        if self.stock_impl is None:
            self.dense = dense.TorchDense(self.geometry)
        else:
            self.dense = dense.StockDense(self.stock_impl, self.geometry, self.is_quantised)

    def _choose_kernels(self) -> None:
        """Choose attention kernels, once for a size of pages.

        Not while vLLM loads weights: what kernels allocate would lie in memory that sleep discards.
        """
        if self.attention is None:
            asked = self.config.attention_kernel
            shape = AttentionShape(self.device, self.dtype, self.geometry, self.cache_dtype)
            self.attention = choose_kernel(asked, shape, self.pages.kernel_order)
            self.prefill_attention = choose_kernel(asked, shape, PREFILL_ORDER)

    def rehearse(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """Make the calls that allocate, while vLLM measures a step (:mod:`vllm_sparse.backend.rehearsal`)."""
        self.dense.rehearse(query)
        workspace = self.workspace
        if not self.is_sparse or len(query) <= workspace.rehearsed.get(self.cache_dtype, 0):
            return
        workspace.rehearsed[self.cache_dtype] = len(query)
        self._choose_kernels()
        shape = (1, self.num_kv_heads, self.pages.prefill_slots, 2 * self.head_size)
        kv = torch.zeros(shape, dtype=self.cache_dtype, device=query.device)
        kernels_of_steps = (self.attention, self.prefill_attention)
        Rehearsal(self.config, workspace, *kernels_of_steps, kv, self.geometry).run(query, output)

    def bind(self, vllm_config, position: int, page_size: int) -> None:
        """Settle what is known only once the KV cache is planned.

        Args:
            position: of the layer among its builder's, for layers whose names have no number.
            page_size: tokens of a page, which vLLM may have changed since the layer was built.
        """
        if self.layer_index is None:
            self.layer_index = position
        scales = self.scales_of(vllm_config.compilation_config.static_forward_context[self.name])
        if (page_size, scales) != (self.page_size, self.scales):
            self.scales = scales
            self._fit(vllm_config, page_size)
        self._choose_kernels()
        self.configure(self.config)

    def scales_of(self, layer) -> KVScales:
        """The scales by which ``layer``, this implementation's, quantises its cache.

        Raises:
            ConfigError: each of its KV heads has its own.
        """
        if not self.is_quantised:
            return KVScales()
        if max(layer._k_scale.numel(), layer._v_scale.numel()) > 1:
            raise ConfigError(
                f"--kv-cache-dtype: {self.kv_cache_dtype!r} with scales for every KV head, as the checkpoint has "
                f"them for layer {self.name}, is not supported by the sparse backend; allowed: scales per tensor, "
                f"or --kv-cache-dtype {str(self.dtype).removeprefix('torch.')}"
            )
        return KVScales(layer._k_scale_float, layer._v_scale_float, layer._q_scale_float)

    def configure(self, config: SparseConfig) -> None:
        """Choose pages by ``config`` from the next step on: its policies, and what they keep in this layer."""
        self.config = config
        self.selection = replace(config.selection(self.page_size), head_budget_pages=self._head_budget_pages())
        self.decode = self.prefill = None
        if config.decode_policy != "dense":
            policy = DECODE_POLICIES[config.decode_policy]
            self.decode = SparseDecode(policy, self.selection, self.geometry, self.layer_index)
        if self.workspace.prefill is not None:
            self.prefill = SparsePrefill(
                config.new_prefill_policy(self.page_size, self._patterns()), self.prefill_attention,
                self.workspace.prefill, self.selection, self.geometry,
            )  # fmt: skip

    def _head_budget_pages(self) -> torch.Tensor | None:
        """int32 [kv_heads]: budgets of this layer's KV heads, where they have their own."""
        if not isinstance(self.config.head_budgets, BudgetTable):
            return None
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        pages = self.config.head_budget_pages(self.page_size, self.layer_index, rank, ranks, self.num_kv_heads)
        return torch.tensor(pages, dtype=torch.int32, device=self.device)

    def _patterns(self) -> HeadPatterns:
        """Prefill patterns of this layer's query heads."""
        table, patterns = self.config.head_patterns, None
        if isinstance(table, PatternTable):
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            patterns = table.of_layer(self.layer_index, rank, ranks, self.num_heads)
            if patterns is None:
                logger.info("sparse attention: layer %d has no patterns of its own", self.layer_index)
        if patterns is None:
            patterns = [self.config.uniform_pattern] * self.num_heads
        return HeadPatterns.of(patterns, self.page_size, self.device)

    # What others ask of a layer

    @property
    def is_sparse(self) -> bool:
        return self.decision.treatment is Treatment.SPARSE

    @property
    def is_quantised(self) -> bool:
        """Whether the cache holds codes of e4m3."""
        return self.cache_dtype is torch.float8_e4m3fn

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.geometry.page_size

    @staticmethod
    def _impls(vllm_config) -> list[SparseImpl]:
        """The layers of an engine that run in this backend, in their order."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        return [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), SparseImpl)]

    @classmethod
    def sparse(cls, vllm_config, workspace: Workspace | None = None) -> list[SparseImpl]:
        """The sparse layers of an engine, or those that share ``workspace``."""
        impls = (impl for impl in cls._impls(vllm_config) if impl.is_sparse)
        return [impl for impl in impls if workspace is None or impl.workspace is workspace]

    @classmethod
    def first(cls, vllm_config, workspace: Workspace | None = None) -> SparseImpl | None:
        """The first of them, whose builder counts steps."""
        return next(iter(cls.sparse(vllm_config, workspace)), None)

    def unreadable(self, kv_cache: torch.Tensor) -> str | None:
        """Why this layer's kernels cannot work on the cache that vLLM has laid out, or None if they can."""
        attention = [self.attention, self.prefill_attention] if self.is_sparse else []
        kv_cache = self._elements(kv_cache)
        return unreadable(kv_cache, self.pages.cache_slots) or self.pages.unreadable(kv_cache, attention)

    # A step

    def _elements(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM's cache in the dtype of what it holds: codes are bytes to vLLM."""
        return kv_cache.view(self.cache_dtype) if self.is_quantised else kv_cache

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Write K and V of new tokens and refresh the summaries of the pages they touch."""
        self.pages.write(key, value, self._elements(kv_cache), slot_mapping)

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            query, output: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size]; already in the cache. None from models that attend
                once more to what is there, such as IQuest's loops.
            kv_cache: [num_blocks, num_kv_heads, page_size + summary slots, 2 * head_size]; the summary slots
                alone with offload.
            attn_metadata: None in profiling runs.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("the sparse backend does not quantise its output")
        md = attn_metadata
        if md is None:
            if self.device.type != "cpu":
                self.rehearse(query, output)
            return output.zero_()
        if not self.pages.ready:
            return output.zero_()
        kv_cache = self._elements(kv_cache)
        if not self.is_sparse:
            self.dense.attend(layer, query, key, value, kv_cache, md.dense_all, output)
            return output
        for index, run in enumerate(md.prefill):
            pages, rows = self.pages.of_run(kv_cache, md.prefill, index), run.tokens
            if run.chunk is not None:
                self.prefill.attend(query, pages, run.block_table, run.chunk, output)
            elif run.look is not None:
                if self.looks:
                    self.prefill.look(query, pages, run.block_table, run.look)
            else:
                k, v = _rows(key, rows), _rows(value, rows)
                self.dense.attend(layer, query[rows], k, v, pages, run.dense, output[rows])
        if md.num_decodes:
            rows = slice(0, md.num_decode_tokens)
            queries, out = query[rows], output[rows]
            if md.dense_short is not None:
                k, v = _rows(key, rows), _rows(value, rows)
                self.pages.attend_short(self.attention, self.dense, layer, queries, k, v, kv_cache, md, out)
            if self.decode is not None:
                self._decode(queries, kv_cache, md, out)
        return output

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, md: SparseMetadata, output: torch.Tensor
    ) -> None:
        """Choose pages for decode rows, and attend over them."""
        self.decode.choose(query, self.pages.scored(kv_cache), self.pages.listed(kv_cache), md.decodes)
        self.pages.attend_chosen(self.attention, query, kv_cache, md, output)

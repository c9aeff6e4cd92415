"""SparseMetadataBuilder: one plan per step, in buffers that CUDA graphs can replay."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_sparse import kernels
from vllm_sparse.backend import dense
from vllm_sparse.backend.impl import SparseImpl
from vllm_sparse.backend.metadata import SparseMetadata, Step
from vllm_sparse.backend.residency import OffloadedRows, ResidentRows
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode.attend import DecodeRows
from vllm_sparse.pages.decode_plan import EXACT, PROMPT, DecodePlan
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_tokens import QueryTokens
from vllm_sparse.prefill.gate import LOOK_LAYERS

logger = logging.getLogger("vllm.vllm_sparse")

NEVER = 2**31 - 1
"""Context up to which decode rows are short where only prefill is sparse."""


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Splits a step into decode and prefill rows; plans the former on the device, the latter on the host."""

    # Rows of one token, and rows of drafts to verify, are the same kernels for every batch of a size, whatever
    # their lengths.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.page_size = kv_cache_spec.block_size
        config = SparseConfig.from_vllm(vllm_config)
        config.check_page_size(self.page_size)
        impls = self._bind_layers(layer_names, vllm_config)
        sparse = [impl for impl in impls if impl.is_sparse]
        self.selects = bool(sparse)
        self.workspace, self.requests = impls[0].workspace, impls[0].requests
        self._assign_counts(impls[0], sparse, vllm_config)
        kind = OffloadedRows if impls[0].layout.on_host else ResidentRows
        dense_builder = dense.DenseBuilder(
            kv_cache_spec, layer_names, vllm_config, device, impls[0].stock_backend, impls[0].kv_cache_dtype
        )  # fmt: skip
        self.rows = kind(config, self.workspace, dense_builder, impls[0])
        self.configure(config)
        if self.selects:
            compilation, tokens = vllm_config.compilation_config, self.workspace.query_tokens
            full = compilation.cudagraph_mode.has_full_cudagraphs()
            captured = compilation.cudagraph_capture_sizes if full else []
            # vLLM rounds these up to whole rows of drafts, and leaves out what is then above the largest.
            rows = {-(-size // tokens) for size in captured}
            captured = sorted(count for count in rows if count * tokens <= max(captured))
            warn_of_batches_without_graphs(captured, vllm_config.scheduler_config.max_num_seqs)
        if self.selects and impls[0].prefill is not None and device.type != "cpu":
            impls[0].prefill.warm_up(impls[0].pages.prefill_slots, impls[0].dtype, impls[0].cache_dtype)

    def _bind_layers(self, names: list[str], vllm_config) -> list[SparseImpl]:
        layers = vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in names]
        for position, impl in enumerate(impls):
            impl.bind(vllm_config, position, self.page_size)
        sparse = [impl for impl in impls if impl.is_sparse]
        for impl in sparse[min(LOOK_LAYERS, len(sparse)) // 2 :: LOOK_LAYERS]:
            impl.looks = True
        return impls

    def _assign_counts(self, layer: SparseImpl, sparse: list[SparseImpl], vllm_config) -> None:
        """Take what this builder counts, so that each step is counted once.

        Hybrid models have several groups of layers, each with a builder, and vLLM may build each twice: steps are
        counted by the one that has the engine's first sparse layer, and samples of a workspace likewise.
        """
        workspace = self.workspace
        self.counts = layer.counts if SparseImpl.first(vllm_config) in sparse else None
        self.monitor = workspace.monitor if SparseImpl.first(vllm_config, workspace) in sparse else None
        if workspace.monitor is not None:
            layers = (impl.layer_index for impl in SparseImpl.sparse(vllm_config, workspace))
            workspace.monitor.measure(layers, layer.config.recall_monitor_layers)
        counted = torch.zeros_like(workspace.plan.counters) if self.counts is None else self.counts.decode.totals
        self.plan = replace(workspace.plan, counters=counted)
        self.prefill_tracker = None
        if sparse and workspace.prefill is not None:
            counted = workspace.prefill.counters
            self.prefill_tracker = next(one for one in layer.counts.prefill if one.totals is counted)

    @property
    def config(self) -> SparseConfig:
        return self.rows.config

    def configure(self, config: SparseConfig) -> None:
        """Plan by ``config`` from the next step on."""
        self.rows.config = config
        self.selection = config.selection(self.page_size)
        self._cut: dict[int, tuple[DecodePlan, PageTable]] = {}
        """Buffers of the workspace by the number of decode rows that they are cut to."""

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SparseMetadata:
        """Plan a step: which rows it has, what the dense backend needs, prefill runs, decode rows; count it."""
        common = common_attn_metadata
        if common.causal is not True:
            raise RuntimeError("sparse attention is causal, and this step's attention is not")
        rows = split_decodes_and_prefills(common, self.workspace.query_tokens)[:3]
        step = Step(common, *rows, self.requests.of_rows(), self.requests.prompts(common))
        if self.selects:
            self._write_budgets(step)
        metadata = SparseMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=step.num_decodes,
            num_decode_tokens=step.num_decode_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            decodes=self._decode_rows(step),
            dense_all=self.rows.dense_all(step, fast_build),
        )
        if step.num_prefills:
            metadata.prefill = self.rows.prefill(step, fast_build)
        if step.num_decodes and self.selects:
            metadata.dense_short = self._plan_decodes(step, metadata.decodes, fast_build)
        self._count(step, metadata)
        return metadata

    def _write_budgets(self, step: Step) -> None:
        """Tell the device which decode rows are prompt tokens, and what the others ask for; in nearly every step
        there is neither and nothing is copied. It must know, not this host code alone: a step of such rows may
        replay a graph of decode steps.
        """
        budgets, rows = self.workspace.plan.budgets, step.num_decodes
        tokens, prefilling = step.asked_tokens[:rows], step.prompts
        prompts = prefilling is not None and prefilling[:rows].any()
        if self.workspace.budgets_asked:
            budgets.zero_()
        self.workspace.budgets_asked = prompts or any(tokens)
        if not self.workspace.budgets_asked:
            return
        asked = torch.zeros(rows, dtype=torch.int32, device="cpu", pin_memory=budgets.device.type != "cpu")
        pages = [count if count == EXACT else count // self.page_size for count in tokens]
        asked[: len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        if prompts:
            asked[: len(prefilling)].masked_fill_(torch.from_numpy(prefilling[:rows]), PROMPT)
        budgets[:rows].copy_(asked, non_blocking=True)

    def _decode_rows(self, step: Step) -> DecodeRows:
        """The workspace's buffers, cut to the step's decode rows."""
        workspace, count = self.workspace, step.num_decodes
        # Steps have few sizes, and the host that schedules a fast model has no time to cut eight tensors in each.
        if count not in self._cut:
            self._cut[count] = self.plan.rows(count), workspace.table.rows(count * workspace.kv_heads)
        plan, table = self._cut[count]
        if step.has_drafts:
            queries = QueryTokens(workspace.query_tokens, step.common.query_start_loc[: count + 1])
            plan = replace(plan, queries=queries)
        block_table = step.common.block_table_tensor[:count]
        table = PageTable(
            table.head_pages, table.lengths, routes=plan.score_offsets, block_table=block_table,
            queries=plan.queries,
        )  # fmt: skip
        return DecodeRows(block_table, plan, table, workspace.scores, workspace.monitor)

    def _plan_decodes(self, step: Step, rows: DecodeRows, fast_build: bool) -> Any:
        """Route decode rows on the device; return metadata of the dense backend where it runs beside the table."""
        common, config = step.common, self.config
        short_rows_dense, dense_beside = self.rows.dense_decodes(step)
        kernels.for_device(self.device).plan_decode(
            common.seq_lens[: step.num_decodes], rows.plan, rows.table, self.selection,
            NEVER if config.decode_policy == "dense" else config.min_context_tokens,
            self.workspace.scores.capacity_pages, short_rows_dense,
        )  # fmt: skip
        if not dense_beside:
            return None
        if step.num_prefills:
            common = dense.decode_rows(common, step.num_decodes, step.num_decode_tokens)
        short = dense.short_rows(common, rows.plan.dense_seq_lens)
        return self.rows.dense.build("eager" if step.num_prefills else "short", short, fast_build)

    def _count(self, step: Step, metadata: SparseMetadata) -> None:
        """Tell the counters what the step does; what they count of it the device adds up."""
        chooses = any(run.chunk is not None for run in metadata.prefill)
        if self.prefill_tracker is not None and chooses:
            self.prefill_tracker.step()
        if self.counts is not None and step.num_prefills:
            self.counts.prefill_steps += 1
            self.counts.sparse_prefill_steps += chooses
        if self.counts is not None and step.num_prefills and self.vllm_config.speculative_config is not None:
            self._count_drafts(step)
        if not step.num_decodes or not self.selects:
            return
        if self.counts is not None:
            self.counts.decode.step()
            if self.counts.hot is not None:
                self.counts.hot.step()
        if self.monitor is not None:
            self.monitor.advance()

    def _count_drafts(self, step: Step) -> None:
        """Count drafts that are verified densely: rows that are no prompt and yet lie behind one, where vLLM has
        not put decode rows first."""
        common, first = step.common, step.num_decodes
        prefilling, lens = step.prompts, common.seq_lens_cpu_upper_bound
        if prefilling is None or lens is None:
            return
        starts = common.query_start_loc_cpu
        tokens = (starts[1:] - starts[:-1])[first : len(prefilling)]
        prefilling = torch.from_numpy(prefilling)
        # More tokens than drafts may have are those of a step that vLLM makes up, to warm up or to be captured.
        verified = ~prefilling[first:] & (tokens > 0) & (tokens <= self.workspace.query_tokens)
        tokens = torch.where(verified, tokens, 0)
        if verified.any():
            lens = lens[first : len(prefilling)]
            self.counts.drafts.add(int(verified.sum()), int(tokens.sum()), int(lens[verified].sum()))


def warn_of_batches_without_graphs(captured: list[int], max_num_seqs: int) -> None:
    """Warn of decode batches for which no CUDA graph was captured, given the sizes that were.

    vLLM pads a decode batch to the next captured size, but to none above ``max_num_seqs``. Seen on an H100: at a
    maximum of six, steps of six requests took 25 ms.
    """
    below = max((size for size in captured if size <= max_num_seqs), default=0)
    above = min((size for size in captured if size > max_num_seqs), default=0)
    if 0 < below < max_num_seqs < above:
        logger.warning(
            "sparse attention: decode batches of more than %d requests run without a full CUDA graph, which is "
            "slow: --max-num-seqs %d is none of the captured sizes; take %d or %d",
            below, max_num_seqs, below, above,
        )  # fmt: skip

"""SparseMetadataBuilder: one plan per step, in buffers that CUDA graphs can replay."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_sparse import kernels
from vllm_sparse.backend import dense, prefill_rows
from vllm_sparse.backend.impl import SparseImpl
from vllm_sparse.backend.metadata import SparseMetadata
from vllm_sparse.config import SparseConfig

logger = logging.getLogger("vllm.vllm_sparse")

SHORT_ROWS_DENSE_FROM = 16
"""Decode batches of this size on run the dense backend beside the sparse engine for short rows: it
reads short contexts faster than a page table does, and in smaller batches costs more than it saves."""
NEVER = 2**31 - 1
"""Context up to which decode rows are short where only prefill is sparse."""


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Splits a step into decode and prefill rows; plans the former on the device, the latter on the host."""

    # Decode of one token per request takes one path; batches of several tokens per request (drafts
    # to verify) take the dense one. Both are the same kernels for every batch of a size.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.config = SparseConfig.from_vllm(vllm_config)
        self.page_size = kv_cache_spec.block_size
        self.config.check_page_size(self.page_size)
        layers = vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in layer_names]
        for position, impl in enumerate(impls):
            impl.bind(position, self.page_size)
            if not impl.workspace.fits(self.page_size, impl.num_heads, impl.num_kv_heads):
                impl.share_workspace(vllm_config, self.page_size)  # vLLM took another page size than it had then
        sparse = [impl for impl in impls if impl.is_sparse]
        self.selects = bool(sparse)
        self.first_layer = impl = impls[0]
        if self.selects and vllm_config.speculative_config is None:
            compilation = vllm_config.compilation_config
            captured = (
                compilation.cudagraph_capture_sizes if compilation.cudagraph_mode.has_full_cudagraphs() else []
            )
            warn_of_batches_without_graphs(captured, vllm_config.scheduler_config.max_num_seqs)
        self.workspace = impl.workspace
        for layer in impls:
            layer.bind_prefill(self.workspace.prefill)
        if self.selects and self.workspace.prefill is not None and device.type != "cpu":
            impl.warm_up_prefill()
        self.dense = dense.DenseBuilder(kv_cache_spec, layer_names, vllm_config, device, impl.stock_backend)
        # Hybrid models have several groups of layers, each with a builder, and vLLM may build each twice: steps
        # are counted by the one that has the engine's first sparse layer, and samples of a workspace likewise.
        self.counts = impl.counts if SparseImpl.first(vllm_config) in sparse else None
        self.monitor = self.workspace.monitor if SparseImpl.first(vllm_config, self.workspace) in sparse else None
        counters = (
            torch.zeros_like(self.workspace.plan.counters) if self.counts is None else self.counts.decode.counters
        )
        self.plan = replace(self.workspace.plan, counters=counters)
        self.prefill_tracker = None
        if self.selects and self.workspace.prefill is not None:
            counted = self.workspace.prefill.counters
            self.prefill_tracker = next(one for one in impl.counts.prefill if one.counters is counted)

    def _mark_prompt_tokens(self, common, num_decodes: int) -> None:
        """Tell the device which rows of one token are prompt tokens; in nearly every step none is, and nothing is
        copied. It must know, not this host code alone: a step of such rows may replay a graph of decode steps.
        """
        whole, prefilling = self.workspace.plan.whole, common.is_prefilling
        found = prefilling is not None and bool(prefilling[:num_decodes].any())
        if self.workspace.marked:
            whole.zero_()
        if found:
            marks = prefilling[:num_decodes].to(torch.uint8)
            marks = marks if whole.device.type == "cpu" else marks.pin_memory()
            whole[: len(marks)].copy_(marks, non_blocking=True)
        self.workspace.marked = found

    def _count_drafts(self, common, num_decodes: int) -> None:
        """Count rows of several tokens that are no prompt: drafts to verify."""
        prefilling, lens = common.is_prefilling, common.seq_lens_cpu_upper_bound
        if prefilling is None or lens is None:
            return
        starts = common.query_start_loc_cpu
        tokens = (starts[1:] - starts[:-1])[num_decodes : len(prefilling)]
        tokens = torch.where(prefilling[num_decodes:], 0, tokens)
        if tokens.any():
            verified = tokens > 0
            self.counts.drafts.add(int(tokens.sum()), int(lens[num_decodes : len(prefilling)][verified].sum()))

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SparseMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise RuntimeError("sparse attention is causal, and this step's attention is not")
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common)
        workspace = self.workspace
        if self.selects:
            self._mark_prompt_tokens(common, num_decodes)
        if num_prefills and self.counts is not None and self.vllm_config.speculative_config is not None:
            self._count_drafts(common, num_decodes)
        plan = self.plan.rows(num_decodes)
        table = workspace.table.rows(num_decodes * workspace.kv_heads)
        table.routes, table.block_table = plan.score_offsets, common.block_table_tensor[:num_decodes]
        metadata = SparseMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            plan=plan,
            table=table,
            scores=workspace.scores,
            monitor=workspace.monitor,
        )
        offloads = self.config.offload is not None
        if not offloads:
            metadata.dense_all = self.dense.build("all", common, fast_build)
        if num_prefills and offloads:
            metadata.runs = prefill_rows.context_runs(
                common, num_decodes, self.config, self.page_size, workspace.max_pages, self.dense,
                self.first_layer.prefill,
            )  # fmt: skip
            if self.prefill_tracker is not None and any(run.chunk is not None for run in metadata.runs):
                self.prefill_tracker.step()
        elif num_prefills:
            metadata.chunks = prefill_rows.sparse_chunks(common, num_decodes, self.config)
            if len(metadata.chunks) < num_prefills:
                rows = dense.prefill_rows(common, num_decodes, num_decode_tokens) if num_decodes else common
                rows = prefill_rows.dense_rows(rows, metadata.chunks, num_decodes)
                metadata.dense_prefill = self.dense.build("prefill", rows, fast_build)
            if metadata.chunks and self.prefill_tracker is not None:
                self.prefill_tracker.step()
        if num_decodes and self.selects:
            selects_decode = self.config.decode_policy != "dense"
            short_rows_dense = (
                num_decodes >= SHORT_ROWS_DENSE_FROM or not selects_decode
                or not self.first_layer.attention.reads_unlisted_rows
            )  # fmt: skip
            dense_beside = short_rows_dense
            if offloads:
                # Dense rows would read all of their contexts from the host: only those that cannot be scored.
                short_rows_dense = False
                dense_beside = num_decodes * workspace.max_pages > workspace.scores.capacity_pages
            kernels.for_device(self.device).plan_decode(
                common.seq_lens[:num_decodes], plan, metadata.table, self.config.selection(self.page_size),
                self.config.min_context_tokens if selects_decode else NEVER,
                workspace.scores.capacity_pages, short_rows_dense,
            )  # fmt: skip
            if dense_beside:
                decodes = common if not num_prefills else dense.decode_rows(common, num_decodes, num_decode_tokens)
                rows = dense.short_rows(decodes, plan.dense_seq_lens)
                metadata.dense_short = self.dense.build("eager" if num_prefills else "short", rows, fast_build)
            if self.counts is not None:
                self.counts.decode.step()
                if self.counts.hot is not None:
                    self.counts.hot.step()
            if self.monitor is not None:
                self.monitor.advance()
        return metadata


def warn_of_batches_without_graphs(captured: list[int], max_num_seqs: int) -> None:
    """vLLM pads a decode batch to the next captured size, but to none above ``max_num_seqs``.

    Seen on an H100: at a maximum of six, steps of six requests took 25 ms.
    """
    below = max((size for size in captured if size <= max_num_seqs), default=0)
    above = min((size for size in captured if size > max_num_seqs), default=0)
    if 0 < below < max_num_seqs < above:
        logger.warning(
            "sparse attention: decode batches of more than %d requests run without a full CUDA graph, which is "
            "slow: --max-num-seqs %d is none of the captured sizes; take %d or %d",
            below, max_num_seqs, below, above,
        )  # fmt: skip

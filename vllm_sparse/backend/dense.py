"""Dense attention over pages with summaries: vLLM's own backend on a GPU, plain torch on a CPU.

Dense layers, prefill and short contexts must cost what they cost in stock vLLM, so they run its code: the backend
that vLLM would have chosen, where that reads K and V through strides. Summary slots are left out of the view.
"""

from __future__ import annotations

import logging
from copy import copy
from functools import cache
from typing import Any

import torch

from vllm_sparse import kernels
from vllm_sparse.backend import compat
from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry

logger = logging.getLogger("vllm.vllm_sparse")

FLASH_HEAD_SIZE = 256
"""Widest head of FlashAttention 2 and 3. Version 4 alone takes wider ones, and prefixes of images; it was not seen
to read pages with summaries."""


def reader_of_pages(
    stock: type, dtype: torch.dtype, head_size: int, kv_cache_dtype: str, image_prefix: bool
) -> type:
    """``stock``, vLLM's own choice for a layer, or the nearest backend that can read pages with summaries.

    Where it is another one a line says so: dense rows then cost what they do in that one.
    ``image_prefix``: tokens of an image attend to each other, the later ones too.
    """
    flash = head_size <= FLASH_HEAD_SIZE and not image_prefix
    if stock.get_name() == "TRITON_ATTN" or (flash and stock.get_name() == "FLASH_ATTN"):
        return stock
    reader = _nearest_reader(dtype, head_size, kv_cache_dtype, flash)
    _say_once(reader.get_name(), stock.get_name())
    return reader


@cache
def _say_once(reader: str, stock: str) -> None:
    logger.warning(
        "sparse attention: dense rows run %s: %s, which vLLM would choose here, was not seen to read pages with "
        "summaries", reader, stock,
    )  # fmt: skip


def _nearest_reader(dtype: torch.dtype, head_size: int, kv_cache_dtype: str, flash: bool) -> type:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    if not flash or dtype not in (torch.float16, torch.bfloat16):
        return TritonAttentionBackend
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    except ImportError:
        return TritonAttentionBackend
    if get_flash_attn_version(head_size=head_size) is None:
        return TritonAttentionBackend
    reads = FlashAttentionBackend.supports_head_size(head_size)
    reads = reads and FlashAttentionBackend.supports_kv_cache_dtype(kv_cache_dtype)
    return FlashAttentionBackend if reads else TritonAttentionBackend


class StockDense:
    """vLLM's own attention implementation, over the token slots of pages."""

    def __init__(self, impl: Any, geometry: Geometry, quantised: bool):
        """``quantised``: the cache holds codes, which some backends multiply with codes of queries only."""
        self.impl, self.geometry = impl, geometry
        self.codes_queries = quantised and impl.supports_quant_query_input

    def attend(self, layer, query, key, value, kv, metadata, out) -> None:
        # vLLM would code queries before it calls a backend, but pages are chosen by queries as they are.
        query = self._codes(query) if self.codes_queries else query
        self.impl.forward(layer, query, key, value, kv[:, :, : self.geometry.page_size], metadata, out)

    def rehearse(self, query: torch.Tensor) -> None:
        """Allocate what :meth:`attend` does for a step of ``query``, while vLLM measures one."""
        if self.codes_queries:
            self._codes(query)

    def _codes(self, query: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(query.shape, dtype=torch.float8_e4m3fn, device=query.device)
        kernels.for_device(query.device).code_queries(query, self.geometry.q_scale, codes)
        return codes


class TorchDense:
    """Dense attention in plain torch; its metadata is vLLM's common one.

    It is causal among the tokens of an image, too, as vLLM's own backend for CPUs is.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry

    def rehearse(self, query: torch.Tensor) -> None:
        """Nothing: memory is not planned where torch attends."""

    def attend(self, layer, query, key, value, kv, metadata, out) -> None:
        reference.dense_attention(
            query, kv, metadata.block_table_tensor, metadata.query_start_loc, metadata.seq_lens, self.geometry,
            out,
        )  # fmt: skip


class DenseBuilder:
    """Builds the metadata of dense attention for rows of a step: all, its prefill, or short decode rows.

    One stock builder each: a builder keeps one buffer of scheduling data for CUDA graphs, and a step can need
    all three. A fourth, ``eager``, keeps none, so a step can take from it as often as it likes: for rows that are
    in no graph, decode rows beside prefill and parts of an offloaded prefill.
    """

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, backend, kv_cache_dtype: str):
        self._builders: dict[str, Any] = {}
        if backend is None:
            return

        def make() -> Any:
            builder = backend.get_builder_cls()(kv_cache_spec, layer_names, vllm_config, device)
            if hasattr(builder, "aot_sliding_window"):
                # Else FlashAttention looks for a window among layers that are not ours.
                builder.aot_sliding_window = (-1, -1)
            if getattr(builder, "cache_config", None) is not None:
                # Else it takes the dtype that most layers have for that of these, which may have been left out.
                builder.cache_config = copy(builder.cache_config)
                builder.cache_config.cache_dtype = kv_cache_dtype
            return builder

        self._builders = {rows: make() for rows in ("all", "prefill", "short")}
        eager = self._builders["prefill"]
        if hasattr(eager, "use_full_cuda_graph"):
            eager = make()
            eager.use_full_cuda_graph = False
        self._builders["eager"] = eager

    def build(self, rows: str, common, fast_build: bool = False) -> Any:
        """Dense metadata for ``common``; the common metadata itself where torch attends."""
        builder = self._builders.get(rows)
        return common if builder is None else builder.build(0, common, fast_build)


def _image_ranges(common, first: int, last: int) -> dict[int, list[tuple[int, int]]] | None:
    """First and last positions of images by row, counted from row ``first`` on, of the rows before ``last``."""
    ranges = common.mm_req_doc_ranges
    return ranges and {row - first: spans for row, spans in ranges.items() if first <= row < last}


def prefill_rows(common, num_decodes: int, num_decode_tokens: int):
    """``common`` without its first ``num_decodes`` rows."""
    starts, starts_cpu = common.query_start_loc[num_decodes:], common.query_start_loc_cpu[num_decodes:]
    return compat.replace_rows(
        common,
        query_start_loc=starts - num_decode_tokens,
        query_start_loc_cpu=starts_cpu - num_decode_tokens,
        seq_lens=common.seq_lens[num_decodes:],
        num_reqs=common.num_reqs - num_decodes,
        num_actual_tokens=common.num_actual_tokens - num_decode_tokens,
        block_table_tensor=common.block_table_tensor[num_decodes:],
        slot_mapping=common.slot_mapping[num_decode_tokens:],
        mm_req_doc_ranges=_image_ranges(common, num_decodes, common.num_reqs),
    )


def rows_between(common, first: int, last: int, block_table: torch.Tensor):
    """``common`` with rows ``first`` to ``last`` alone, over other pages; some rows in them may be empty."""
    starts, starts_cpu = common.query_start_loc[first : last + 1], common.query_start_loc_cpu[first : last + 1]
    tokens = slice(int(starts_cpu[0]), int(starts_cpu[-1]))
    return compat.replace_rows(
        common,
        query_start_loc=starts - tokens.start,
        query_start_loc_cpu=starts_cpu - tokens.start,
        seq_lens=common.seq_lens[first:last],
        num_reqs=last - first,
        num_actual_tokens=tokens.stop - tokens.start,
        block_table_tensor=block_table,
        slot_mapping=common.slot_mapping[tokens],
        mm_req_doc_ranges=_image_ranges(common, first, last),
    )


def short_rows(common, dense_seq_lens: torch.Tensor):
    """``common`` with the lengths of rows that go dense; 0 for the others. No query of theirs is in an image."""
    return compat.replace_rows(common, seq_lens=dense_seq_lens, mm_req_doc_ranges=None)


def decode_rows(common, num_decodes: int, num_decode_tokens: int):
    """``common`` with only its decode rows.

    Its longest query stays that of the step: by it stock tells that such rows run beside prefill, at whose size
    there is no memory for parts of split rows.
    """
    return compat.replace_rows(
        common,
        query_start_loc=common.query_start_loc[: num_decodes + 1],
        query_start_loc_cpu=common.query_start_loc_cpu[: num_decodes + 1],
        seq_lens=common.seq_lens[:num_decodes],
        num_reqs=num_decodes,
        num_actual_tokens=num_decode_tokens,
        block_table_tensor=common.block_table_tensor[:num_decodes],
        slot_mapping=common.slot_mapping[:num_decode_tokens],
    )

"""Which prefill rows of a step run sparse, from the lengths that vLLM keeps on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_sparse.backend import compat, dense
from vllm_sparse.config import SparseConfig
from vllm_sparse.offload.context import ContextPages, ContextRun
from vllm_sparse.prefill import plan_chunks
from vllm_sparse.query_blocks import QueryBlocks


def sparse_chunks(common, num_decodes: int, config: SparseConfig) -> list[QueryBlocks]:
    """Chunks of vLLM's common metadata that choose pages; none in dummy runs, which carry no lengths.

    vLLM's bound on a length is the length itself for all rows but drafts to verify, which are too
    short for a chunk.
    """
    lens = common.seq_lens_cpu_upper_bound
    if config.prefill_policy == "dense" or lens is None:
        return []
    starts = common.query_start_loc_cpu.tolist()
    return plan_chunks(starts, lens[: common.num_reqs].tolist(), config.min_prefill_tokens, num_decodes)


def dense_rows(prefills, chunks: list[QueryBlocks], num_decodes: int):
    """Common metadata of prefill rows with length 0 for those in ``chunks``."""
    if not chunks:
        return prefills
    dense = torch.ones(prefills.num_reqs, dtype=prefills.seq_lens.dtype)
    dense[[chunk.request - num_decodes for chunk in chunks]] = 0
    if prefills.seq_lens.is_cuda:
        dense = dense.pin_memory().to(prefills.seq_lens.device, non_blocking=True)
    return compat.replace_rows(prefills, seq_lens=prefills.seq_lens * dense)


def context_runs(
    common, num_decodes: int, config: SparseConfig, page_size: int, max_pages: int, builder: dense.DenseBuilder
) -> list[ContextRun]:
    """Prefill rows of a step in offload mode, in parts whose contexts fit a buffer of ``max_pages``.

    None in dummy runs, which carry no lengths. vLLM's bound on a length is exact, as there are no drafts.
    """
    lens = common.seq_lens_cpu_upper_bound
    if lens is None:
        return []
    starts, lens = common.query_start_loc_cpu.tolist(), lens[: common.num_reqs].tolist()
    chunks = {chunk.request: chunk for chunk in sparse_chunks(common, num_decodes, config)}
    runs: list[ContextRun] = []
    together: list[ContextPages] = []

    def attend_densely() -> None:
        if together:
            first, last = together[0].request, together[-1].request + 1
            table = _buffer_tables(together, common.block_table_tensor.device)
            rows = dense.rows_between(common, first, last, table)
            metadata = builder.build("prefill", rows, fast_build=True)
            runs.append(ContextRun(list(together), slice(starts[first], starts[last]), table, metadata))
            together.clear()

    for request in range(num_decodes, common.num_reqs):
        start, end, seq_len = starts[request], starts[request + 1], lens[request]
        if start == end:
            continue
        old, pages = (seq_len - (end - start)) // page_size, -(-seq_len // page_size)
        place = together[-1].place + together[-1].num_pages if together else 0
        if request in chunks or place + pages > max_pages:
            attend_densely()
            place = 0
        context = ContextPages(request, start, old, pages, place)
        if request not in chunks:
            together.append(context)
            continue
        table = _buffer_tables([context], common.block_table_tensor.device)
        chunk = replace(chunks[request], request=0)
        runs.append(ContextRun([context], slice(start, end), table, chunk=chunk))
    attend_densely()
    return runs


def _buffer_tables(contexts: list[ContextPages], device: torch.device) -> torch.Tensor:
    """int32 [contexts, pages]: consecutive pages of a buffer; past a context's own they mean nothing."""
    pages = torch.arange(max(context.num_pages for context in contexts), dtype=torch.int32, device=device)
    if len(contexts) == 1:
        return pages[None] + contexts[0].place
    places = torch.tensor([context.place for context in contexts], dtype=torch.int32)
    if device.type != "cpu":
        places = places.pin_memory().to(device, non_blocking=True)
    return places[:, None] + pages

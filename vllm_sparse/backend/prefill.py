"""Which prefill rows of a step run sparse, from the lengths that vLLM keeps on the CPU."""

from __future__ import annotations

import torch

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
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

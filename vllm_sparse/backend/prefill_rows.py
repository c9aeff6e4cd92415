"""Prefill rows of a step: which of them run sparse, and with offload which contexts are read together.

Decided on the host, from the lengths that vLLM keeps there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_sparse.backend import compat, dense
from vllm_sparse.backend.metadata import Step
from vllm_sparse.config import SparseConfig
from vllm_sparse.offload.contexts import ContextRun
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.prefill.attend import SparsePrefill, plan_chunks
from vllm_sparse.prefill.gate import AUTO, ChunkGate

MOST_TABLE_ENTRIES = 1 << 20
"""Requests times pages of the longest, of those that a dense run takes together: its block table has 4 MiB."""


def sparse_chunks(
    step: Step, config: SparseConfig, gate: ChunkGate | None, can_look: bool = False
) -> tuple[list[QueryBlocks], list[QueryBlocks]]:
    """Chunks of a step that choose pages, and dense ones whose choice is looked at.

    None in dummy runs, which carry no lengths.

    Args:
        gate: of the workspace, which has one wherever some prefill is sparse.
        can_look: whether dense chunks can be looked at.

    Chunks with tokens of an image that attend to later ones choose none. vLLM's bound on a length is the length
    itself for all rows but drafts to verify, which are too short for a chunk.
    """
    common = step.common
    lens = common.seq_lens_cpu_upper_bound
    if config.prefill_policy == "dense" or lens is None:
        return [], []
    starts, lens = common.query_start_loc_cpu.tolist(), lens[: common.num_reqs].tolist()
    least = config.least_auto_tokens if config.prefill_policy == AUTO else config.min_prefill_tokens
    chunks = plan_chunks(starts, lens, least, step.num_decodes)
    images = common.mm_req_doc_ranges or {}
    chunks = [each for each in chunks if not any(_meets(each, *span) for span in images.get(each.request, ()))]
    chunks = [chunk for chunk in chunks if not step.is_exact(chunk.request)]
    return gate.sort(chunks, can_look) if config.prefill_policy == AUTO else (chunks, [])


def _meets(chunk: QueryBlocks, first: int, last: int) -> bool:
    """Whether an image at positions ``first`` to ``last`` has tokens in a chunk."""
    return first < chunk.end_position and last >= chunk.first_position


def dense_rows(prefills, chunks: list[QueryBlocks], num_decodes: int):
    """Common metadata of prefill rows with length 0 for those in ``chunks``."""
    if not chunks:
        return prefills
    is_dense = torch.ones(prefills.num_reqs, dtype=prefills.seq_lens.dtype, device="cpu")
    is_dense[[chunk.request - num_decodes for chunk in chunks]] = 0
    return compat.replace_rows(
        prefills, seq_lens=prefills.seq_lens * _to_device(is_dense, prefills.seq_lens.device)
    )


@dataclass
class _Context:
    """The context of one request in a run."""

    request: int
    old_pages: int
    """Pages that earlier steps filled."""
    num_pages: int
    """Pages with this step's tokens."""
    staged: int
    """Staging page of its first new page."""
    place: int
    """Page of the buffer at which it starts."""
    read: torch.Tensor
    """int32: those of its old pages that its queries may attend to."""


def context_runs(
    step: Step,
    config: SparseConfig,
    page_size: int,
    max_pages: int,
    builder: dense.DenseBuilder,
    sparse: SparsePrefill | None,
    gate: ChunkGate | None = None,
) -> list[ContextRun]:
    """Prefill rows of a step in offload mode, in parts whose contexts fit a buffer of ``max_pages``.

    Dense rows read all old pages, chunks those that ``sparse``, which attends them, may attend to.

    vLLM's bound on a length is exact for all rows of prefill. Dummy runs carry none, and may wait for the
    device. Staging pages are counted as :mod:`vllm_sparse.kernels.plan_writes` does: one per decode row,
    then those that each chunk touches; how many more the drafts of decode rows touch the device alone knows.
    """
    common, num_decodes = step.common, step.num_decodes
    lens = common.seq_lens_cpu_upper_bound
    lens = (common.seq_lens if lens is None else lens)[: common.num_reqs].tolist()
    starts = common.query_start_loc_cpu.tolist()
    chunks = {chunk.request: chunk for chunk in sparse_chunks(step, config, gate)[0]}
    runs: list[ContextRun] = []
    together: list[_Context] = []
    every: list[_Context] = []

    def add_dense_run() -> None:
        if together:
            first, last = together[0].request, together[-1].request + 1
            run = _run_of(together, slice(starts[first], starts[last]), common.block_table_tensor)
            rows = dense.rows_between(common, first, last, run.block_table)
            run.dense = builder.build("eager", rows, fast_build=True)
            runs.append(run)
            together.clear()

    staged, widest = num_decodes, 0
    for request in range(num_decodes, common.num_reqs):
        start, end, seq_len = starts[request], starts[request + 1], lens[request]
        if start == end:
            continue
        seq_len = max(seq_len, end - start)  # dummy runs may carry no lengths
        old, pages = (seq_len - (end - start)) // page_size, -(-seq_len // page_size)
        place = together[-1].place + together[-1].num_pages if together else 0
        widest = max(pages, widest) if together else pages
        if together and (
            request in chunks
            or request > together[-1].request + 1
            or place + pages > max_pages
            or (len(together) + 1) * widest > MOST_TABLE_ENTRIES
        ):
            add_dense_run()
            place, widest = 0, pages
        read = sparse.pages_in_reach(chunks[request]) if request in chunks else None
        if read is None:
            read = torch.arange(old, dtype=torch.int32, device="cpu")
        together.append(_Context(request, old, pages, staged, place, read))
        every.append(together[-1])
        staged += pages - old
        if request in chunks:
            run = _run_of(together, slice(start, end), common.block_table_tensor)
            run.chunk = replace(chunks[request], request=0)
            runs.append(run)
            together.clear()
    add_dense_run()
    if step.has_drafts:
        more = _pages_begun(common.slot_mapping[: step.num_decode_tokens], page_size) - num_decodes
        for run in runs:
            run.new_pages += more
    if runs and num_decodes + len(every) > 1:  # else nothing is hit that others write
        written = _written_blocks(step, every, page_size)
        for run in runs:
            nearest = torch.searchsorted(written, run.old_blocks).clamp_(max=len(written) - 1)
            run.late_places = torch.where(written[nearest] == run.old_blocks, run.old_places, -1)
    return runs


def _pages_begun(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """int32 [], on the device: staging pages of tokens that go to ``slots``."""
    blocks = torch.where(slots >= 0, slots // page_size, -1)
    begins = blocks >= 0
    begins[1:] &= blocks[1:] != blocks[:-1]
    return begins.sum(dtype=torch.int32)


def _written_blocks(step: Step, contexts: list[_Context], page_size: int) -> torch.Tensor:
    """int32 [pages], ascending: the blocks that this step's tokens go to."""
    common = step.common
    rows = [context.request for context in contexts for _ in range(context.old_pages, context.num_pages)]
    pages = [page for context in contexts for page in range(context.old_pages, context.num_pages)]
    both = torch.tensor([rows, pages], dtype=torch.int32, device="cpu")
    rows, pages = _to_device(both, common.block_table_tensor.device).long()
    decodes = common.slot_mapping[: step.num_decode_tokens] // page_size
    return torch.cat([common.block_table_tensor[rows, pages], decodes.int()]).sort().values


def _to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` without a wait."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _run_of(contexts: list[_Context], tokens: slice, block_table: torch.Tensor) -> ContextRun:
    """The run of ``contexts``, whose indices go to the device in one copy."""
    parts: list[list[torch.Tensor]] = []
    for context in contexts:
        new = torch.arange(context.old_pages, context.num_pages, dtype=torch.int32, device="cpu")
        parts.append([
            torch.full_like(context.read, context.request), context.read, context.read + context.place,
            new - context.old_pages + context.staged, new + context.place, new.new_tensor([context.place]),
        ])  # fmt: skip
    whole = [torch.cat(part) for part in zip(*parts, strict=True)]
    host = _to_device(torch.cat(whole), block_table.device)
    rows, old, old_places, new, new_places, places = host.split([len(part) for part in whole])
    pages = torch.arange(max(context.num_pages for context in contexts), dtype=torch.int32, device=host.device)
    return ContextRun(
        tokens=tokens,
        # Past its own pages a row of the table means nothing.
        block_table=places[:, None] + pages,
        old_blocks=block_table[rows.long(), old.long()],
        old_places=old_places,
        new_pages=new,
        new_places=new_places,
    )

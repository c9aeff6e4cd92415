"""Contexts of prefill, read from the host into GPU buffers while the layer before still computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse import kernels
from vllm_sparse.offload.transfer import WritePlan
from vllm_sparse.query_blocks import QueryBlocks

LINK_PROGRAMS, GPU_PROGRAMS = 32, 1024
"""Programs of a copy: enough for a link to the host, whose reads run beside attention, and for a GPU's memory."""


@dataclass(frozen=True)
class ContextPages:
    """Where the context of one request lies in a buffer."""

    request: int
    """Row of the step's block table."""
    first_token: int
    """Row of its first query in the step's tokens."""
    old_pages: int
    """Pages that earlier steps filled: they come from the host."""
    num_pages: int
    """Pages with this step's tokens; those past ``old_pages`` are staged on the GPU."""
    place: int
    """Page of the buffer at which it starts."""


@dataclass
class ContextRun:
    """Prefill rows of a step that are attended together, over contexts in one buffer."""

    contexts: list[ContextPages]
    tokens: slice
    """Their queries among the step's tokens."""
    block_table: torch.Tensor
    """int32 [requests, pages]: pages of the buffer."""
    dense: Any = None
    """Metadata of the dense backend, or None for a chunk."""
    chunk: QueryBlocks | None = None
    """Queries of one request that choose pages; its ``request`` is 0."""


class ContextReader:
    """Two buffers of one layer's context each: one is attended while the next is read.

    Reads run on a stream of their own, in the order in which a step attends: all runs of a layer, then
    those of the next layer. Prefill steps are never part of a CUDA graph.
    """

    def __init__(self, max_pages: int, hosts: list[torch.Tensor], hot: torch.Tensor):
        self.hosts, self.hot = hosts, hot
        heads, page_size, content = hosts[0].shape[1:]
        self.buffers = [
            torch.zeros(max_pages, heads, page_size, content, dtype=hot.dtype, device=hot.device) for _ in range(2)
        ]
        self.page_size = page_size
        self.kernels = kernels.for_device(hot.device)
        self.stream = torch.cuda.Stream(hot.device) if hot.is_cuda else None
        self.turn = 0
        self._ahead: tuple[int, ContextRun] | None = None

    @property
    def max_pages(self) -> int:
        return self.buffers[0].shape[0]

    def open(
        self, layer: int, runs: list[ContextRun], index: int, block_table: torch.Tensor, plan: WritePlan
    ) -> torch.Tensor:
        """The contexts of ``runs[index]`` in ``layer``: [pages, kv_heads, page_size, 2 * head_dim].

        Args:
            layer: position among the layers of this rank.
            runs: all of the step.
            block_table: int32 [num_reqs, max_pages] of the step.
            plan: this step's writes, which the layer has staged.
        """
        run, buffer = runs[index], self.buffers[self.turn]
        if self._is_ahead(layer, run):
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self._read_old(layer, run, block_table, buffer)
        self._ahead = None
        following = (layer, index + 1) if index + 1 < len(runs) else (layer + 1, 0)
        self.turn = 1 - self.turn
        if self.stream is not None and following[0] < len(self.hosts):
            # What was attended in the other buffer, and written to the host before, is done by then.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._read_old(following[0], runs[following[1]], block_table, self.buffers[self.turn])
            self._ahead = (following[0], runs[following[1]])
        for context in run.contexts:
            new = context.num_pages - context.old_pages
            # Dummy runs write nothing; what they attend is never read.
            first = plan.staged_slots[context.first_token].clamp(min=0) // self.page_size
            staged = first + torch.arange(new, device=buffer.device)
            start = context.place + context.old_pages
            self.kernels.read_pages(self.hot, staged, buffer[start : start + new], GPU_PROGRAMS)
        return buffer

    def _is_ahead(self, layer: int, run: ContextRun) -> bool:
        return self._ahead is not None and self._ahead[0] == layer and self._ahead[1] is run

    def _read_old(self, layer: int, run: ContextRun, block_table: torch.Tensor, buffer: torch.Tensor) -> None:
        for context in run.contexts:
            blocks = block_table[context.request, : context.old_pages]
            self.kernels.read_pages(self.hosts[layer], blocks, buffer[context.place :], LINK_PROGRAMS)

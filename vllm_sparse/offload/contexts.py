"""Contexts of prefill, read from the host into GPU buffers while the layer before still computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.prefill.runs import PrefillRun

LINK_PROGRAMS, GPU_PROGRAMS = 32, 1024
"""Programs of a copy: enough for a link to the host, whose reads run beside attention, and for a GPU's memory."""


@dataclass(kw_only=True)
class ContextRun(PrefillRun):
    """A prefill run over contexts that are read side by side into one buffer, whose pages ``block_table`` names.

    A chunk's ``request`` is 0.
    """

    old_blocks: torch.Tensor
    """int32 [old pages]: blocks that earlier steps filled, to be read from the host. Those that no query of the
    run can attend to are not among them; the buffer holds anything in their place."""
    old_places: torch.Tensor
    """int32 [old pages]: pages of the buffer that they go to."""
    late_places: torch.Tensor | None = None
    """``old_places`` of blocks that this very step writes, else -1: prefix hits on requests that run beside. None
    where no others run."""
    new_pages: torch.Tensor
    """int32 [new pages]: staging pages that this step writes to."""
    new_places: torch.Tensor
    """int32 [new pages]: pages of the buffer that they go to."""


class ContextReader:
    """Two buffers of one layer's context each: one is attended while the next is read.

    Reads run on a stream of their own, in the order in which a step attends: all runs of a layer, then
    those of the next layer. Prefill steps are never part of a CUDA graph.
    """

    def __init__(
        self, max_pages: int, hosts: list[torch.Tensor], hot: torch.Tensor, exponents: list[torch.Tensor | None]
    ):
        self.hosts, self.hot, self.exponents = hosts, hot, exponents
        self.buffers = [
            torch.zeros(max_pages, *hosts[0].shape[1:], dtype=hot.dtype, device=hot.device) for _ in range(2)
        ]
        self.kernels = kernels.for_device(hot.device)
        self.stream = torch.cuda.Stream(hot.device) if hot.is_cuda else None
        self.turn = 0
        self.pages_read = 0
        """Pages read from the host so far; those read again after the step's own writes count once."""
        self._ahead: tuple[int, ContextRun] | None = None

    def open(self, layer: int, runs: list[ContextRun], index: int) -> torch.Tensor:
        """The contexts of ``runs[index]`` in ``layer``: [pages, kv_heads, page_size, 2 * head_dim].

        Args:
            layer: position among the layers of this rank, which has staged this step's writes.
            runs: all of the step.
        """
        run, buffer = runs[index], self.buffers[self.turn]
        if self._ahead is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        if not self._is_ahead(layer, run):
            self._read_old(layer, run, buffer)
        elif run.late_places is not None:
            # What was read ahead was read before this layer's writes.
            self._read_from_host(layer, run, buffer, run.late_places)
        self._ahead = None
        following = (layer, index + 1) if index + 1 < len(runs) else (layer + 1, 0)
        self.turn = 1 - self.turn
        if self.stream is not None and following[0] < len(self.hosts):
            # What was attended in the other buffer, and written to the host before, is done by then.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._read_old(following[0], runs[following[1]], self.buffers[self.turn])
            self._ahead = (following[0], runs[following[1]])
        self.kernels.read_pages(self.hot, run.new_pages, buffer, run.new_places, GPU_PROGRAMS)
        return buffer

    def _is_ahead(self, layer: int, run: ContextRun) -> bool:
        return self._ahead is not None and self._ahead[0] == layer and self._ahead[1] is run

    def _read_old(self, layer: int, run: ContextRun, buffer: torch.Tensor) -> None:
        self.pages_read += len(run.old_blocks)
        self._read_from_host(layer, run, buffer, run.old_places)

    def _read_from_host(self, layer: int, run: ContextRun, buffer: torch.Tensor, places: torch.Tensor) -> None:
        self.kernels.read_pages(
            self.hosts[layer], run.old_blocks, buffer, places, LINK_PROGRAMS, self.exponents[layer]
        )

"""What a step writes: pages under way, staged on the GPU, written through to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class WritePlan:
    """Pages that a step writes to, found on the device from its slot mapping, once for all layers.

    A page that is being written lies in the staging pages, the first ones of the hot store: its older
    rows are read back from the host, ``page_write`` adds the new ones, and these go to the host. Nothing
    of it outlives the step, so preemption, abort and reuse of blocks leave nothing behind.
    """

    staged_slots: torch.Tensor
    """int64 [max_num_tokens]: ``staged page * page_size + row`` of each token; -1: not written."""
    blocks: torch.Tensor
    """int32 [max_pages]: vLLM's block of each staged page."""
    first_row: torch.Tensor
    """int32 [max_pages]: rows before it were written in earlier steps."""
    end_row: torch.Tensor
    """int32 [max_pages]: rows from ``first_row`` to here are written in this step."""
    num_pages: torch.Tensor
    """int32 [1]."""
    clock: torch.Tensor
    """int32 [1]: steps so far, the time of last use of slots."""
    num_misses: torch.Tensor
    """int32 [layers]: head pages that this step lacks in each layer; 0 until the layer looks for them."""

    @classmethod
    def empty(cls, max_num_tokens: int, max_pages: int, layers: int, device: torch.device) -> WritePlan:
        def zeros(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            zeros(max_num_tokens, torch.int64), zeros(max_pages), zeros(max_pages), zeros(max_pages),
            zeros(1), zeros(1), zeros(layers),
        )  # fmt: skip

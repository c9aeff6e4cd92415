"""Launch sizes that depend on the device, shared by the kernels that split a context."""

from __future__ import annotations

from functools import cache

import torch


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 64 where Triton's interpreter stands in for one."""
    if device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(device).multi_processor_count


def page_splits(rows: int, max_pages: int, block_pages: int, device: torch.device) -> int:
    """Programs per row of pages: enough to fill the GPU, few enough that idle ones cost nothing.

    Programs of a row stride over its pages, so the grid needs no knowledge of lengths. At least 8,
    so that one long request among many short ones does not end up on a few multiprocessors.
    """
    wanted = max(8, -(-4 * num_multiprocessors(device) // rows))
    return max(1, min(wanted, -(-max_pages // block_pages)))

"""What launchers share: launch sizes that depend on the device, and programmatic dependent launch.

Every decode kernel begins with :func:`start_dependent`: the next kernel of the chain may then set
itself up while this one runs, and each waits for the one before it to end before it reads
anything. No kernel may return before that wait, or the one after it would not wait for the one
before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def start_dependent(PDL: tl.constexpr):
    """Let the next kernel launch, then wait until the memory of the one before is visible."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@cache
def dependent_launch(device: torch.device) -> dict:
    """Launch options for programmatic dependent launch, on GPUs that have it (Hopper and later)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 where Triton's interpreter stands in for one."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def page_splits(rows: int, max_pages: int, block_pages: int, device: torch.device, waves: int = 4) -> int:
    """Programs per row of pages: enough to fill the GPU, few enough that idle ones cost nothing.

    Programs of a row stride over its pages, so the grid needs no knowledge of lengths. At least 8,
    so that one long request among many short ones does not end up on a few multiprocessors.
    """
    wanted = max(8, -(-waves * num_multiprocessors(device) // rows))
    return max(1, min(wanted, -(-max_pages // block_pages)))

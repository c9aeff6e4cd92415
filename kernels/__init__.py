"""GPU kernels in Triton and their plain-torch references.

:func:`for_device` returns the namespace that runs on a device; both offer the same launchers:
``page_write``, ``plan_decode``, ``range_score``, ``sketch_score``, ``page_mass``, ``recency_score``,
``random_score``, ``select_pages``, ``sparse_decode``, ``recall_mass``; for prefill
``probe_mass``, ``select_bands``, ``vertical_slash``, ``position_pattern``, ``pooled_score``,
``antidiagonal_score``, ``pattern_distance``, ``select_row_pages``, ``prefill_table``, ``sparse_prefill``; for
offload ``plan_writes``, ``stage_pages``, ``write_through``, ``find_hot_slots``, ``fetch_head_pages``,
``read_pages``.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch


def for_device(device: torch.device) -> ModuleType:
    """Triton launchers for a GPU, plain torch for a CPU (Triton is not needed there)."""
    return _reference() if device.type == "cpu" else _launchers()


# Cached, for an import statement takes as long as a small launch.
@functools.cache
def _reference() -> ModuleType:
    from vllm_sparse.kernels import reference

    return reference


@functools.cache
def _launchers() -> ModuleType:
    from vllm_sparse.kernels import launchers

    return launchers

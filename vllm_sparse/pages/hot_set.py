"""Residency: which units of a layer the hot set holds, and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.offload.sizing import WAYS

HASH = 0x9E3779B1
"""Fibonacci hashing (Knuth, TAOCP 3, 6.4): neighbouring units go to sets far apart, evenly."""


@dataclass
class Residency:
    """A set-associative cache of units: a unit may lie in any of the 16 slots of one set.

    A decode step first stamps the slots of the chosen units that are there, then gives each missing one
    the least recently used slot of its set that this step does not need. Where the step needs all 16, the
    unit is read from the host for this once.
    """

    slot_of: torch.Tensor
    """int32 [num_blocks * kv_heads]: slot that holds the unit ``block * kv_heads + head``, or -1."""
    slot_unit: torch.Tensor
    """int32 [num_slots]: unit that was last put into the slot, or -1."""
    last_use: torch.Tensor
    """int32 [num_slots]: step that last needed the slot; 0: free."""
    first_unit: int
    """Unit of the hot store at which slot 0 lies."""

    @classmethod
    def empty(cls, num_units: int, num_slots: int, first_unit: int, device: torch.device) -> Residency:
        assert num_slots % WAYS == 0
        return cls(
            torch.full((num_units,), -1, dtype=torch.int32, device=device),
            torch.full((num_slots,), -1, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
            first_unit,
        )

    @property
    def num_sets(self) -> int:
        return self.last_use.shape[0] // WAYS

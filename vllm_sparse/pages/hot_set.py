"""HotSet: which head pages of a layer the hot set holds, and where; Lookups: what steps ask of the hot sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WAYS = 16
"""Hot slots among which a head page can be placed (:mod:`vllm_sparse.kernels.find_hot_slots`)."""
HASH = 0x9E3779B1
"""Fibonacci hashing (Knuth, TAOCP 3, 6.4): neighbouring head pages go to sets far apart, evenly."""


@dataclass
class HotSet:
    """A set-associative cache of head pages: a head page may lie in any of the 16 slots of one set.

    A decode step first stamps the slots of the chosen head pages that are there, then gives each missing one
    the least recently used slot of its set that this step does not need. Where the step needs all 16, the
    head page is read from the host for this once.
    """

    slot_of: torch.Tensor
    """int32 [num_blocks * kv_heads]: slot that holds the head page ``block * kv_heads + head``, or -1."""
    slot_head_page: torch.Tensor
    """int32 [num_slots]: head page that was last put into the slot, or -1."""
    last_use: torch.Tensor
    """int32 [num_slots]: step that last needed the slot; 0: free."""
    first_head_page: int
    """Head page of the hot store at which slot 0 lies."""

    @classmethod
    def empty(cls, num_head_pages: int, num_slots: int, first_head_page: int, device: torch.device) -> HotSet:
        assert num_slots % WAYS == 0
        return cls(
            torch.full((num_head_pages,), -1, dtype=torch.int32, device=device),
            torch.full((num_slots,), -1, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
            first_head_page,
        )

    @property
    def num_sets(self) -> int:
        return self.last_use.shape[0] // WAYS


@dataclass
class Lookups:
    """What decode steps look for in the hot sets, shared by all layers, which take their turns."""

    misses: torch.Tensor
    """int32 [rows * max_pages or more]: the ``WritePlan.num_misses`` places in ``PageTable.head_pages`` whose head
    pages the layer at work lacks."""
    counters: torch.Tensor
    """int64 [3], running totals of all layers: head pages looked for, fetched into slots, read from the host in
    place."""

    @classmethod
    def empty(cls, most_misses: int, device: torch.device) -> Lookups:
        return cls(
            torch.zeros(most_misses, dtype=torch.int32, device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
        )

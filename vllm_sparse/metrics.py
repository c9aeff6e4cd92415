"""What ran sparse, what ran dense and why, and how much of the context was attended."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from vllm_sparse.guard import guards

logger = logging.getLogger("vllm.vllm_sparse")

REPORT_SECONDS = 10.0
REPORT_STEPS = 16


@dataclass
class LayerCounts:
    """Layers of this process, counted once when they are built."""

    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    """Reason -> layers that this backend runs dense."""
    stock: Counter[str] = field(default_factory=Counter)
    """Reason -> kinds of layers that were left to vLLM's own backends."""


layers = LayerCounts()


def count_sparse_layer() -> None:
    layers.sparse += 1


def count_dense_layer(reason: str) -> None:
    """Count a layer that runs dense in this backend; the first of each reason is logged."""
    if reason not in layers.dense:
        logger.info("sparse attention: layers run dense: %s", reason)
    layers.dense[reason] += 1


def count_stock_layer(reason: str) -> None:
    """Count a kind of layer that keeps vLLM's own backend; the first of each reason is logged."""
    if reason not in layers.stock:
        logger.warning("sparse attention: layers keep vLLM's own backend: %s", reason)
    layers.stock[reason] += 1


class Counters:
    """Running totals of the device, reported now and then.

    The device adds into ``counters`` (int64) in every step. A report is an asynchronous copy, logged
    some steps later, so no step waits for it.
    """

    def __init__(self, counters: torch.Tensor):
        self.counters = counters
        on_gpu = counters.device.type != "cpu"
        self._copied = torch.zeros(len(counters), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._forget_reports()

    def _log(self, *totals: int) -> None:
        raise NotImplementedError

    def _forget_reports(self) -> None:
        self._steps = self._logged = 0
        self._copying = False
        self._next_report = 0.0

    def reset(self) -> None:
        """Forget what was counted so far: warm-up and graph capture decode nothing real."""
        self.counters.zero_()
        self._forget_reports()

    def read(self) -> tuple[int, ...]:
        """The totals so far; waits for the device."""
        return tuple(self.counters.tolist())

    def step(self) -> None:
        """Call once per step."""
        self._steps += 1
        if self._steps % REPORT_STEPS:
            return
        if self._copying:
            self._copying = False
            self._log(*self._copied.tolist())
        elif time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            self._copied.copy_(self.counters, non_blocking=True)
            self._copying = True


class AttendedTokens(Counters):
    """Attended and context tokens of ``what``."""

    def __init__(self, counters: torch.Tensor, what: str = "decode steps"):
        super().__init__(counters)
        self.what = what

    def _log(self, attended: int, context: int) -> None:
        if context <= self._logged:
            return
        self._logged = context
        logger.info(
            "sparse attention: attended %d of %d tokens (%.1f%%) in %s so far",
            attended, context, 100 * attended / context, self.what,
        )  # fmt: skip


class HotSet(Counters):
    """Units that decode steps looked for, fetched into the hot set, and read on the host in place."""

    def __init__(self, counters: torch.Tensor, unit_bytes: int):
        super().__init__(counters)
        self.unit_bytes = unit_bytes

    def reset(self) -> None:
        super().reset()
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        super().step()

    def _log(self, looked_up: int, fetched: int, in_place: int) -> None:
        if looked_up <= self._logged:
            return
        self._logged = looked_up
        moved = fetched + in_place
        logger.info(
            "sparse attention: %.1f%% of the chosen units were in the hot set; %.2f MiB a decode step came from "
            "the host (%d units in place)",
            100 * (1 - moved / looked_up), moved * self.unit_bytes / 2**20 / max(1, self.steps), in_place,
        )  # fmt: skip


def track_hot_set(counters: torch.Tensor, unit_bytes: int) -> None:
    """Report the hot set of this process's engine; the newest one is the last of ``hot_sets``."""
    tracker = HotSet(counters, unit_bytes)
    tracker.reset()
    hot_sets.append(tracker)


def step_hot_sets() -> None:
    """Call once per decode step."""
    for tracker in hot_sets:
        tracker.step()


def reset_hot_sets() -> None:
    """Forget what graph capture counted."""
    for tracker in hot_sets:
        tracker.reset()


hot_sets: list[HotSet] = []
"""Offload: one per engine of this process, newest last."""
trackers: list[AttendedTokens] = []
"""One per metadata builder of this process, newest last."""
prefill_trackers: list[AttendedTokens] = []
"""The same of sparse prefill chunks: (query, key) pairs of all their layers and query heads."""


def snapshot(worker: object = None) -> dict:
    """This process's counts as plain data; the argument lets ``collective_rpc`` call it."""
    totals = [tracker.read() for tracker in trackers]
    prefill = [tracker.read() for tracker in prefill_trackers]
    return {
        "sparse_layers": layers.sparse,
        "dense_layers": dict(layers.dense),
        "stock_layers": dict(layers.stock),
        "attended_tokens": sum(attended for attended, _ in totals),
        "context_tokens": sum(context for _, context in totals),
        "guard_shares": [guard.read() for guard in guards],
        "prefill_attended_pairs": sum(attended for attended, _ in prefill),
        "prefill_causal_pairs": sum(causal for _, causal in prefill),
        **_hot_set(),
    }


def _hot_set() -> dict:
    if not hot_sets:
        return {}
    looked_up, fetched, in_place = hot_sets[-1].read()
    return {
        "units_looked_up": looked_up,
        "units_fetched": fetched,
        "units_in_place": in_place,
        "unit_bytes": hot_sets[-1].unit_bytes,
        "decode_steps": hot_sets[-1].steps,
    }


def reset() -> None:
    """Forget all counts (a new engine in the same process)."""
    layers.sparse = 0
    layers.dense.clear()
    layers.stock.clear()
    trackers.clear()
    prefill_trackers.clear()
    guards.clear()
    hot_sets.clear()

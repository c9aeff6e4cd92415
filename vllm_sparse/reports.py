"""Running totals of the device, logged and read without a wait."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import torch

REPORT_SECONDS = 10.0
"""Least time between two reports."""
REPORT_STEPS = 16
"""Steps between two looks at the clock, and between a copy and its line in the log."""


class Recent:
    """Totals of the device as they were when they were last looked at; never waits."""

    def __init__(self, totals: torch.Tensor):
        self.totals = totals
        # vLLM builds its layers with the GPU as default device.
        on_gpu = totals.device.type != "cpu"
        self._copied = torch.zeros(totals.shape, dtype=totals.dtype, device="cpu", pin_memory=on_gpu)
        self._arrival = torch.cuda.Event() if on_gpu else None
        self._seen = self._copied.tolist()

    def forget(self) -> None:
        """Take totals for zeros, as they are from now on."""
        self._seen = self._copied.zero_().tolist()

    def look(self) -> list:
        """The totals, nested as they are.

        Each look has them copied for the next one, unless the copy before is still under way.
        """
        if self._arrival is None:
            return self.totals.tolist()
        if self._arrival.query():
            self._seen = self._copied.tolist()
            self._copied.copy_(self.totals, non_blocking=True)
            self._arrival.record()
        return self._seen


class Totals(ABC):
    """Numbers that the device adds up in every step.

    A report is an asynchronous copy, logged some steps later, so no step waits for it.
    """

    def __init__(self, totals: torch.Tensor):
        self.totals = totals
        self._recent = Recent(totals)
        on_gpu = totals.device.type != "cpu"
        self._copied = torch.zeros(totals.shape, dtype=totals.dtype, device="cpu", pin_memory=on_gpu)
        self._forget_reports()

    @abstractmethod
    def _log(self, copied: torch.Tensor) -> None:
        """Write a line about totals as they were some steps ago, on the CPU."""

    def _forget_reports(self) -> None:
        self._steps = self._logged = 0
        self._copying = False
        self._next_report = 0.0
        self._recent.forget()

    def reset(self) -> None:
        """Forget what was added up so far: warm-up and graph capture decode nothing real."""
        self.totals.zero_()
        self._forget_reports()

    def read(self) -> list:
        """The totals so far, nested as they are; waits for the device."""
        return self.totals.tolist()

    def recent(self) -> list:
        """The totals as they were when this was last called, nested as they are; never waits."""
        return self._recent.look()

    def step(self) -> None:
        """Call once per step."""
        self._steps += 1
        if self._steps % REPORT_STEPS:
            return
        if self._copying:
            self._copying = False
            self._log(self._copied)
        elif time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            self._copied.copy_(self.totals, non_blocking=True)
            self._copying = True

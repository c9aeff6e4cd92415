"""Running totals of the device, logged and read without a wait."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import torch

REPORT_SECONDS = 10.0
"""Least time between two reports."""
REPORT_STEPS = 16
"""Steps between two looks at the clock, and between a copy and its line in the log."""


class Totals(ABC):
    """Numbers that the device adds up in every step.

    A report is an asynchronous copy, logged some steps later, so no step waits for it.
    """

    def __init__(self, totals: torch.Tensor):
        self.totals = totals
        # vLLM builds its layers with the GPU as default device.
        on_gpu = totals.device.type != "cpu"
        self._copied, self._asked = torch.zeros(
            2, *totals.shape, dtype=totals.dtype, device="cpu", pin_memory=on_gpu
        )  # for the log, and for those who ask
        self._arrival = torch.cuda.Event() if on_gpu else None
        self._forget_reports()

    @abstractmethod
    def _log(self, copied: torch.Tensor) -> None:
        """Write a line about totals as they were some steps ago, on the CPU."""

    def _forget_reports(self) -> None:
        self._steps = self._logged = 0
        self._copying = False
        self._next_report = 0.0
        self._recent = self._asked.zero_().tolist()

    def reset(self) -> None:
        """Forget what was added up so far: warm-up and graph capture decode nothing real."""
        self.totals.zero_()
        self._forget_reports()

    def read(self) -> list:
        """The totals so far, nested as they are; waits for the device."""
        return self.totals.tolist()

    def recent(self) -> list:
        """The totals as they were when this was last called, nested as they are; never waits.

        Each call has them copied for the next one, unless the copy before is still under way.
        """
        if self._arrival is None:
            return self.read()
        if self._arrival.query():
            self._recent = self._asked.tolist()
            self._asked.copy_(self.totals, non_blocking=True)
            self._arrival.record()
        return self._recent

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

"""RecallMonitor: the attention mass that chosen pages hold, measured while an engine serves.

In every ``every``-th decode step each layer also computes the exact attention mass of all pages of one of
the step's sparse rows (:mod:`vllm_sparse.kernels.recall_mass`) and adds up what share the chosen pages
hold. The device counts steps, picks the row and keeps the sums, so a CUDA graph replays it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch

from vllm_sparse.pages.recall_sums import RecallSums

logger = logging.getLogger("vllm.vllm_sparse")

REPORT_SECONDS = 10.0
REPORT_STEPS = 16


@dataclass
class RecallMonitor(RecallSums):
    """The sums, and now and then a line in the log about them."""

    _copied: torch.Tensor = field(init=False, repr=False)
    _steps: int = 0
    _next_report: float = 0.0
    _copying: bool = False
    _logged: float = 0.0

    def __post_init__(self) -> None:
        # vLLM builds its layers with the GPU as default device.
        on_gpu = self.sums.device.type != "cpu"
        self._copied = torch.zeros(self.sums.shape, dtype=torch.float64, device="cpu", pin_memory=on_gpu)

    def reset(self) -> None:
        """Forget what was measured so far: warm-up and graph capture decode nothing real."""
        self.step.zero_()
        self.sums.zero_()

    def advance(self) -> None:
        """Call once per decode step, before its layers run; reports now and then, and never waits."""
        self.step.add_(1)
        self._steps += 1
        if self._steps % REPORT_STEPS:
            return
        if self._copying:
            self._copying = False
            self._log()
        elif time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            self._copied.copy_(self.sums, non_blocking=True)
            self._copying = True

    def _log(self) -> None:
        found, rows = self._copied[..., 0].sum().item(), self._copied[..., 1].sum().item()
        if rows > self._logged:
            self._logged = rows
            shares = self._copied[..., 0].sum(-1) / self._copied[..., 1].sum(-1)
            lowest = int(shares.nan_to_num(nan=2.0).argmin())
            logger.info(
                "sparse attention: chosen pages held %.1f%% of the attention mass in sampled rows so far, "
                "least in layer %d (%.1f%%)", 100 * found / rows, lowest, 100 * shares[lowest].item(),
            )  # fmt: skip

    def read(self) -> list[float | None]:
        """Share of each layer so far, None of one without samples; waits for the device."""
        found, rows = self.sums.sum(1).unbind(-1)
        return [share / n if n else None for share, n in zip(found.tolist(), rows.tolist(), strict=True)]

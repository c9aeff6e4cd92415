"""RecallMonitor: the attention mass that chosen pages hold, measured while an engine serves.

In every ``every``-th decode step each layer also computes the exact attention mass of all pages of one of
the step's sparse rows (:mod:`vllm_sparse.kernels.recall_mass`) and adds up what share the chosen pages
hold. The device counts steps, picks the row and keeps the sums, so a CUDA graph replays it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from vllm_sparse.pages.recall_sums import RecallSums
from vllm_sparse.reports import Totals

logger = logging.getLogger("vllm.vllm_sparse")


class _Shares(Totals):
    """Sums of shares of each layer and KV head, and how many."""

    def _log(self, copied):
        found, rows = copied[..., 0].sum().item(), copied[..., 1].sum().item()
        if rows > self._logged:
            self._logged = rows
            shares = copied[..., 0].sum(-1) / copied[..., 1].sum(-1)
            lowest = int(shares.nan_to_num(nan=2.0).argmin())
            logger.info(
                "sparse attention: chosen pages held %.1f%% of the attention mass in sampled rows so far, "
                "least in layer %d (%.1f%%)", 100 * found / rows, lowest, 100 * shares[lowest].item(),
            )  # fmt: skip


@dataclass
class RecallMonitor(RecallSums):
    """The sums, and now and then a line in the log about them."""

    _shares: _Shares = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shares = _Shares(self.sums)

    def reset(self) -> None:
        """Forget what was measured so far: warm-up and graph capture decode nothing real."""
        self.step.zero_()
        self._shares.reset()

    def advance(self) -> None:
        """Call once per decode step, before its layers run; reports now and then, and never waits."""
        self.step.add_(1)
        self._shares.step()

    def read(self) -> list[float | None]:
        """Share of each layer so far, None of one without samples; waits for the device."""
        found, rows = self.sums.sum(1).unbind(-1)
        return [share / n if n else None for share, n in zip(found.tolist(), rows.tolist(), strict=True)]

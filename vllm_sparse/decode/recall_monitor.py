"""RecallMonitor: the attention mass that chosen pages hold, measured while an engine serves.

In every ``every``-th decode step some layers also compute the exact attention mass of all pages of one of
the step's sparse rows (:mod:`vllm_sparse.kernels.recall_mass`) and add up what share the chosen pages
hold. The device counts steps, picks the row and keeps the sums, so a CUDA graph replays it. In the other steps
these layers launch a kernel that returns at once, which costs more than the samples: hence not all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
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

    measured: frozenset[int] = frozenset()
    """Numbers of the layers that are measured."""
    _shares: _Shares = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shares = _Shares(self.sums)

    def measure(self, layers: Iterable[int], most: int) -> None:
        """Measure ``most`` of ``layers``, spread evenly, or with 0 all of them."""
        numbers = sorted(set(layers) & set(range(len(self.sums))))
        count = len(numbers)
        if 0 < most < count:
            numbers = [numbers[(2 * place + 1) * count // (2 * most)] for place in range(most)]
        self.measured = frozenset(numbers)

    def reset(self) -> None:
        """Forget what was measured so far: warm-up and graph capture decode nothing real."""
        self.step.zero_()
        self._shares.reset()

    def advance(self) -> None:
        """Call once per decode step, before its layers run; reports now and then, and never waits."""
        self.step.add_(1)
        self._shares.step()

    def recent(self) -> dict[int, tuple[float, float]]:
        """Of each measured layer the sum of shares, over KV heads and samples, and their number, as they were when
        this was last called; never waits."""
        sums = self._shares.recent()
        return {layer: tuple(map(sum, zip(*sums[layer], strict=True))) for layer in sorted(self.measured)}

    def read(self) -> list[float | None]:
        """Share of each layer so far, None of one without samples; waits for the device."""
        found, rows = self.sums.sum(1).unbind(-1)
        return [share / n if n else None for share, n in zip(found.tolist(), rows.tolist(), strict=True)]

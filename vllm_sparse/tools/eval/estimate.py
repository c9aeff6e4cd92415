"""How long a run will take: the tokens to prefill and the steps to decode, at the speed of the engine just now.

A prompt of the longest of the run is prefilled, and a batch of it decoded for :data:`STEPS` steps, both timed; all
prompts are then taken to run at that rate. Shorter ones run faster, answers may end before their room is used
up, and what is run twice (dense steps of ``text`` in a second engine) or loaded (weights) is not counted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_sparse.tools.eval.samples import Sample
from vllm_sparse.tools.eval.settings import Setting

STEPS = 8


@dataclass
class Work:
    """What is to be run."""

    prefill_tokens: int = 0
    answer_tokens: int = 0
    """The most that answers have room for."""
    steps: int = 0
    """Decode steps for those, each of a batch of requests."""

    def add(self, sample: Sample, count: int, settings: Collection[Setting], batch: int) -> None:
        """Add ``count`` samples like ``sample`` under each of ``settings``, ``batch`` at a time.

        A prompt is prefilled once for all settings that prefill it alike, of several turns for each setting."""
        alike = {s if sample.turns else (s.prefill_policy, s.top_p) for s in settings}
        self.prefill_tokens += len(sample.tokens) * count * len(alike)
        self.answer_tokens += sample.answer_tokens * count * len(settings)
        self.steps += sample.answer_tokens * -(-count // batch) * len(settings)

    def describe(self) -> str:
        return f"{self.prefill_tokens:,} tokens to prefill, at most {self.answer_tokens:,} to generate"


@dataclass(frozen=True)
class Speed:
    prefill_tokens_per_s: float
    step_s: float
    batch: int

    def seconds(self, work: Work) -> float:
        return work.prefill_tokens / self.prefill_tokens_per_s + work.steps * self.step_s

    def describe(self, work: Work) -> str:
        each = f"{self.prefill_tokens_per_s:,.0f} tokens/s of prefill, {1e3 * self.step_s:.1f} ms a decode step"
        return f"{duration(self.seconds(work))}, at {each} of {self.batch} requests"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is shortest to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

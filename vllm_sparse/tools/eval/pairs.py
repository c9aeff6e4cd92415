"""Two settings on the same samples: means and their difference, with intervals, and which samples were lost.

Rows of a task and length with the same seed are of the same prompt, so settings are compared sample by sample:
what makes one prompt harder than another is in both and cancels. :mod:`vllm_sparse.tools.eval.intervals` has the
intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from vllm_sparse.tools.eval import intervals
from vllm_sparse.tools.eval.intervals import Interval
from vllm_sparse.tools.eval.settings import Setting
from vllm_sparse.tools.eval.summary import Summary, aligned
from vllm_sparse.tools.eval.tasks import LOSSES

SCORES = "all scores"
"""Stands for all tasks together but those that have losses."""
MOST_SHOWN = 10
"""Lost samples of a task that are shown with their answers."""
MOST_ANSWER = 60
"""Characters of an answer that are shown."""

Place = tuple[str, int, int]
"""Task, length and seed: a sample."""


@dataclass
class Pair:
    """A setting beside another, on the samples that both have."""

    first: dict[Place, float]
    second: dict[Place, float]
    bounded: bool
    """Whether values are scores in 0 to 1, more of which is better; else losses."""

    @property
    def differences(self) -> dict[Place, float]:
        """Second less first."""
        return {place: self.second[place] - value for place, value in self.first.items() if place in self.second}

    @property
    def interval(self) -> Interval | None:
        values = list(self.differences.values())
        if not values:
            return None
        return intervals.paired(values) if self.bounded else intervals.bootstrap(values)

    @property
    def lost(self) -> list[Place]:
        """Samples on which the second setting is worse, what was lost most first."""
        sign = 1 if self.bounded else -1
        worse = {place: sign * value for place, value in self.differences.items() if sign * value < 0}
        return sorted(worse, key=lambda place: (worse[place], place))

    @property
    def won(self) -> int:
        return sum(value != 0 for value in self.differences.values()) - len(self.lost)


def values(summary: Summary, setting: Setting, task: str, length: int | None = None) -> dict[Place, float]:
    """Scores of a setting, or of :data:`LOSSES` its loss, by sample."""
    name = "loss" if task in LOSSES else "score"
    return {
        (row["task"], row["length"], row["seed"]): row[name]
        for row in summary.of(setting)
        if (row["task"] == task or (task == SCORES and row["task"] not in LOSSES))
        and length in (None, row["length"])
    }


def pair(summary: Summary, first: Setting, second: Setting, task: str, length: int | None = None) -> Pair:
    before, after = (values(summary, setting, task, length) for setting in (first, second))
    return Pair(before, after, bounded=task not in LOSSES)


def mean_interval(found: dict[Place, float], bounded: bool) -> Interval | None:
    return intervals.wilson(mean(found), len(found)) if bounded else intervals.bootstrap(list(found.values()))


def mean(found: dict[Place, float]) -> float:
    return sum(found.values()) / len(found)


HEADINGS = ("task", "setting", "score", "95 %", "less dense", "95 %", "lost", "won", "samples")


def lines(summary: Summary) -> Iterator[tuple[str, ...]]:
    """A line of :data:`HEADINGS` for each task and setting, over all lengths; texts have losses for scores."""
    scored = [task for task in summary.tasks if task not in LOSSES]
    for task in (*summary.tasks, *([SCORES] if len(scored) > 1 else [])):
        for setting in summary.settings:
            found = pair(summary, Setting(), setting, task)
            if not found.second:
                continue
            differences = {} if setting.is_dense else found.differences
            yield (
                f"{task}, loss in nats" if task in LOSSES else task, setting.describe(),
                f"{mean(found.second):.3f}", _shown(mean_interval(found.second, found.bounded)),
                *((f"{mean(differences):+.3f}", _shown(found.interval, "+"),
                   str(len(found.lost)), str(found.won)) if differences else ("", "", "", "")),
                str(len(found.second)),
            )  # fmt: skip


def _shown(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"


def table(summary: Summary) -> str:
    return aligned([HEADINGS, *lines(summary)], left=2)


def comparison(summary: Summary, first: Setting, second: Setting) -> str:
    """For a terminal: the second setting less the first by task and length, and the samples that it lost."""
    headings = ("task", "tokens", first.describe(), second.describe(), "difference", *HEADINGS[5:])
    lengths = [*summary.lengths, None] if len(summary.lengths) > 1 else summary.lengths
    found, lost = [headings], []
    for task, length in (*product(summary.tasks, lengths), (SCORES, None)):
        both = pair(summary, first, second, task, length)
        if not both.differences:
            continue
        found.append((task, "all" if length is None else f"{length:,}", *_cells(both)))
        if length is not None and both.bounded:
            lost += _lost(summary, both, first, second)
    title = f"{second.describe()} less {first.describe()}, on the same samples:"
    return "\n".join([title, "", aligned(found), *(["", "Lost samples:", *lost] if lost else [])])


def caches(first: Summary, second: Summary) -> str:
    """For a terminal: rows over one KV cache less those over another, setting by setting on the same samples."""
    scored = [task for task in second.tasks if task not in LOSSES]
    found: list[tuple[str, ...]] = [("task", "setting", "that", "this", "difference", *HEADINGS[5:])]
    for task in (*second.tasks, *([SCORES] if len(scored) > 1 else [])):
        for setting in second.settings:
            sides = (values(summary, setting, task) for summary in (first, second))
            both = Pair(*sides, bounded=task not in LOSSES)
            if both.differences:
                found.append((task, setting.describe(), *_cells(both)))
    return aligned(found, left=2)


def _cells(both: Pair) -> Iterator[str]:
    """Means of the two on the samples that both have, and their difference, which is not empty."""
    differences = both.differences
    for side in (both.first, both.second):
        yield f"{mean({place: side[place] for place in differences}):.3f}"
    yield f"{mean(differences):+.3f}"
    yield _shown(both.interval, "+")
    yield from map(str, (len(both.lost), both.won, len(differences)))


def _lost(summary: Summary, both: Pair, first: Setting, second: Setting) -> Iterator[str]:
    for place in both.lost[:MOST_SHOWN]:
        task, length, seed = place
        rows = [summary.row(setting, *place) for setting in (first, second)]
        said = [_cut(row["answer"]) for row in rows]
        yield (
            f"{task}, {length:,} tokens, seed {seed}: {both.first[place]:.2f} to {both.second[place]:.2f}; "
            f"expected {_cut(', '.join(rows[0]['expected']))}; {first.describe()} said {said[0]}, "
            f"{second.describe()} {said[1]}"
        )
    if len(both.lost) > MOST_SHOWN:
        task, length, _ = both.lost[0]
        yield f"{task}, {length:,} tokens: {len(both.lost) - MOST_SHOWN} more"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= MOST_ANSWER else f"{text[:MOST_ANSWER]}...")

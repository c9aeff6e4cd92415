"""Means of an evaluation's rows, and how divergence grows with length and shrinks with budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_sparse.tools.eval.rows import current
from vllm_sparse.tools.eval.settings import Setting
from vllm_sparse.tools.eval.tasks import LOSSES, PREFILL_TEXT, RENAMED, TASKS, TEXT


@dataclass
class Cell:
    """Means over the samples of a setting, task and length."""

    samples: int
    values: dict[str, float]
    """Means by name: ``excess`` (loss less dense loss, nats), ``kl``, ``same_top`` and ``recall`` of :data:`TEXT`,
    ``score`` of other tasks, ``attended`` of all. A value that no sample has is missing."""


@dataclass
class Fit:
    """``log KL = intercept + length * log(length) + budget * log(budget)``, by least squares."""

    intercept: float
    length: float
    """Exponent of the length; 0 where all points have one length."""
    budget: float
    points: list[tuple[int, int, float, float]]
    """Points of (length, budget, measured KL, fitted KL)."""

    @property
    def residual(self) -> float:
        """Root mean square of ``log(measured / fitted)``."""
        return math.sqrt(sum(math.log(kl / fitted) ** 2 for *_, kl, fitted in self.points) / len(self.points))


class Summary:
    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows = [current(row) for row in rows]
        self.settings = sorted(self._of, key=_order)
        self.tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
        self.lengths = sorted({row["length"] for row in rows})

    @cached_property
    def _of(self) -> dict[Setting, dict[tuple, dict]]:
        """Rows by setting, and by task, length and seed."""
        found: dict[Setting, dict[tuple, dict]] = {}
        for row in self.rows:
            found.setdefault(Setting.of_row(row), {})[row["task"], row["length"], row["seed"]] = row
        return found

    def of(self, setting: Setting) -> list[dict[str, Any]]:
        """The rows of a setting, the last of each sample."""
        return list(self._of.get(setting, {}).values())

    def row(self, setting: Setting, task: str, length: int, seed: int) -> dict[str, Any]:
        return self._of[setting][task, length, seed]

    @cached_property
    def cells(self) -> dict[tuple[Setting, str, int], Cell]:
        groups: dict[tuple, list[dict]] = {}
        for row in self.rows:
            groups.setdefault((Setting.of_row(row), row["task"], row["length"]), []).append(row)
        return {key: Cell(len(rows), _means(rows)) for key, rows in groups.items()}

    def mean(self, setting: Setting, task: str, name: str, length: int | None = None) -> float | None:
        """Mean of a value over lengths, or at one; None where it was not measured."""
        task = RENAMED.get(task, task)
        lengths = self.lengths if length is None else [length]
        found = [self.cells.get((setting, task, n)) for n in lengths]
        values = [cell.values[name] for cell in found if cell is not None and name in cell.values]
        return sum(values) / len(values) if values else None

    def fit(self, policy: str) -> Fit | None:
        """The fit of a decode policy beside dense prefill; None where there are too few points.

        Where a budget covers the context, what is measured is rounding.
        """
        import numpy as np

        points = [
            (length, setting.budget, cell.values["kl"])
            for (setting, task, length), cell in self.cells.items()
            if task == TEXT and setting.policy == policy and setting.prefill_policy == "dense"
            and setting.budget is not None and setting.more is None and cell.values["kl"] > 0
            and cell.values.get("attended", 0) < 1
        ]  # fmt: skip
        columns = [lambda length, budget: 1.0, lambda length, budget: math.log(budget)]
        if len({length for length, *_ in points}) > 1:
            columns.append(lambda length, budget: math.log(length))
        if len({budget for _, budget, _ in points}) < 2 or len(points) <= len(columns):
            return None
        matrix = np.array([[column(length, budget) for column in columns] for length, budget, _ in points])
        target = np.log([kl for *_, kl in points])
        found, *_ = np.linalg.lstsq(matrix, target, rcond=None)
        fitted = np.exp(matrix @ found).tolist()
        intercept, budget, *length = found.tolist()
        return Fit(intercept, length[0] if length else 0.0, budget,
                   [(*point, value) for point, value in zip(points, fitted, strict=True)])  # fmt: skip


def _order(setting: Setting) -> tuple:
    return (
        setting.prefill_policy != "dense", setting.prefill_policy, setting.top_p or 0,
        setting.policy != "dense", setting.policy, setting.budget or 0,
        setting.more or "",
    )  # fmt: skip


def _means(rows: list[dict]) -> dict[str, float]:
    getters: dict[str, Callable[[dict], float | None]] = {
        "excess": lambda row: row["loss"] - row["dense_loss"] if "loss" in row else None,
        "loss": lambda row: row.get("loss"),
        "kl": lambda row: row.get("kl"),
        "same_top": lambda row: row.get("same_top"),
        "recall": lambda row: _flat_mean(row.get("recall")),
        "mass": lambda row: _flat_mean(row.get("mass")),
        "score": lambda row: row.get("score"),
        "attended": lambda row: row.get("attended"),
        "prefill_density": lambda row: row.get("prefill_density"),
    }
    found = {}
    for name, get in getters.items():
        values = [value for row in rows if (value := get(row)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _flat_mean(table: list[list[float]] | None) -> float | None:
    values = [value for row in table or [] for value in row]
    return sum(values) / len(values) if values else None


def columns(summary: Summary) -> list[tuple[str, Callable[[Setting], float | None], str]]:
    """Columns of a table of settings: heading, value and format."""
    found = []
    if TEXT in summary.tasks:
        found += [
            ("loss - dense", lambda setting: summary.mean(setting, TEXT, "excess"), "+.4f"),
            ("KL", lambda setting: summary.mean(setting, TEXT, "kl"), ".4f"),
            ("same top", lambda setting: summary.mean(setting, TEXT, "same_top"), ".3f"),
            ("recall", lambda setting: summary.mean(setting, TEXT, "recall"), ".3f"),
        ]
    if PREFILL_TEXT in summary.tasks:
        found += [
            ("prefill, loss - dense", lambda setting: summary.mean(setting, PREFILL_TEXT, "excess"), "+.4f"),
            ("density", lambda setting: summary.mean(setting, PREFILL_TEXT, "prefill_density"), ".3f"),
        ]
    for task in summary.tasks:
        if task not in LOSSES:
            found.append((task, lambda setting, task=task: summary.mean(setting, task, "score"), ".2f"))
    return found


def cells_of(summary: Summary, setting: Setting) -> Iterable[str]:
    """The texts of a setting's line in a table."""
    for _, value, form in columns(summary):
        found = value(setting)
        yield "" if found is None else format(found, form)


def table(summary: Summary) -> str:
    """A table for a terminal: a line per setting, means over samples and lengths."""
    headings = [heading for heading, *_ in columns(summary)]
    lines = [("setting", *headings)]
    lines += [(setting.describe(), *cells_of(summary, setting)) for setting in summary.settings]
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]], left: int = 1) -> str:
    """Lines of cells in columns, the ``left`` first ones flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) if i < left else text.rjust(width)
                  for i, (text, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )  # fmt: skip

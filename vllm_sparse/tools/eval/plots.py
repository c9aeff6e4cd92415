"""Figures of an evaluation. Each function returns a figure, or None where nothing of the kind was measured."""

from __future__ import annotations

from matplotlib.figure import Figure

from vllm_sparse.tools.eval.settings import Setting
from vllm_sparse.tools.eval.summary import Summary
from vllm_sparse.tools.eval.tasks import LOSSES, TEXT

COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#000000",
)  # fmt: skip
DENSE_COLOR = "#8a8f98"
MAX_PANELS = 12


def _panels(count: int, width: float, height: float, columns: int = 3):
    """A figure and ``count`` axes in rows of ``columns``."""
    columns = min(count, columns)
    figure = Figure(figsize=(width * columns, height * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes


def _families(summary: Summary) -> dict[tuple, list[Setting]]:
    """Settings that differ in budget alone: lines of a plot."""
    families: dict[tuple, list[Setting]] = {}
    for setting in summary.settings:
        if setting.budget is not None:
            key = (setting.policy, setting.prefill_policy, setting.top_p, setting.more)
            families.setdefault(key, []).append(setting)
    return families


def _label(family: tuple) -> str:
    return Setting(family[0], None, *family[1:]).describe()


def _against_budget(axis, summary: Summary, task: str, name: str, length: int | None, log: bool) -> None:
    for index, (family, settings) in enumerate(_families(summary).items()):
        points = [(s.budget, summary.mean(s, task, name, length)) for s in settings]
        points = [(budget, value) for budget, value in points if value is not None and (value > 0 or not log)]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLORS[index % len(COLORS)],
                      linestyle="-" if family[1] == "dense" else "--", label=_label(family))  # fmt: skip
    dense = summary.mean(Setting(), task, name, length)
    if dense is not None and not log:
        axis.axhline(dense, color=DENSE_COLOR, linewidth=1, label="dense")
    budgets = sorted({s.budget for s in summary.settings if s.budget is not None})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets], minor=False)
    axis.set_xlabel("budget, tokens", fontsize=8)
    if log:
        axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def text_by_budget(summary: Summary) -> Figure | None:
    """KL, excess loss and recall against budget; a row per length."""
    lengths = [n for n in summary.lengths if summary.mean(Setting(), TEXT, "kl", n) is not None]
    if not lengths or not _families(summary):
        return None
    quantities = (("kl", "KL to dense, nats", True), ("excess", "loss less dense loss, nats", False),
                  ("recall", "mass relative to the best pages", False))  # fmt: skip
    figure, axes = _panels(3 * len(lengths), 3.6, 2.8)
    for row, length in enumerate(lengths):
        for column, (name, title, log) in enumerate(quantities):
            axis = axes[3 * row + column]
            _against_budget(axis, summary, TEXT, name, length, log)
            axis.set_title(f"{title}, {length:,} tokens", fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def tasks_by_budget(summary: Summary) -> Figure | None:
    """Score against budget; a panel per task, means over lengths."""
    tasks = [task for task in summary.tasks if task not in LOSSES]
    if not tasks or not _families(summary):
        return None
    figure, axes = _panels(len(tasks), 3.6, 2.8)
    for axis, task in zip(axes, tasks, strict=False):
        _against_budget(axis, summary, task, "score", None, False)
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"{task}, score", fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def needles(summary: Summary) -> Figure | None:
    """Score over depth, in eighths, and length; a panel per setting, the smallest budgets first."""
    cells: dict[Setting, dict[tuple, list[float]]] = {}
    for row in summary.rows:
        if row.get("depth") is not None:
            setting = Setting.of_row(row)
            place = round(8 * row["depth"]) / 8, row["length"]
            cells.setdefault(setting, {}).setdefault(place, []).append(row["score"])
    if not cells:
        return None
    shown = sorted(cells, key=lambda s: (not s.is_dense, s.budget or 0, s.describe()))[:MAX_PANELS]
    lengths = sorted({length for found in cells.values() for _, length in found})
    depths = sorted({depth for found in cells.values() for depth, _ in found})
    figure, axes = _panels(len(shown), 2.4, 2.2, 4)
    for axis, setting in zip(axes, shown, strict=False):
        found = cells[setting]
        means = [[_mean(found.get((depth, length), [])) for length in lengths] for depth in depths]
        axis.imshow(means, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axis.set_title(setting.describe(), fontsize=8)
    axes[0].set_ylabel("depth of the needle", fontsize=8)
    return figure


def recall_by_head(summary: Summary) -> Figure | None:
    """Recall of each layer and KV head; a panel per decode policy, at its smallest budget."""
    tables: dict[Setting, list[list[list[float]]]] = {}
    layers: list[int] = []
    for row in summary.rows:
        if row.get("recall") and row["prefill_policy"] == "dense":
            tables.setdefault(Setting.of_row(row), []).append(row["recall"])
            layers = row["layers"]
    if not tables:
        return None
    smallest = min(setting.budget for setting in tables)
    shown = sorted((s for s in tables if s.budget == smallest), key=lambda s: s.policy)[:MAX_PANELS]
    figure, axes = _panels(len(shown), 2.4, 3.6, 5)
    for axis, setting in zip(axes, shown, strict=False):
        found = tables[setting]
        heads = range(len(found[0][0]))
        means = [[_mean([t[layer][head] for t in found]) for head in heads] for layer in range(len(layers))]
        image = axis.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_xticks(list(heads)[:: max(1, len(heads) // 8)])
        places = list(range(0, len(layers), max(1, len(layers) // 10)))
        axis.set_yticks(places, [str(layers[place]) for place in places], fontsize=7)
        axis.set_xlabel("KV head", fontsize=8)
        axis.set_title(f"{setting.describe()}", fontsize=8)
    axes[0].set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes[: len(shown)].tolist(), shrink=0.8)
    return figure


def fits(summary: Summary) -> Figure | None:
    """Measured against fitted KL of every policy, and what is left of it."""
    found = {policy: fit for policy in _policies(summary) if (fit := summary.fit(policy)) is not None}
    if not found:
        return None
    figure, (left, right) = _panels(2, 4.2, 3.2)
    for index, (policy, fit) in enumerate(found.items()):
        measured, fitted = [p[2] for p in fit.points], [p[3] for p in fit.points]
        color = COLORS[index % len(COLORS)]
        left.loglog(fitted, measured, "o", markersize=4, color=color, label=policy)
        ratios = [kl / value for kl, value in zip(measured, fitted, strict=True)]
        right.loglog([p[1] for p in fit.points], ratios, "o", markersize=4, color=color)
    ends = [
        min(p[3] for f in found.values() for p in f.points),
        max(p[3] for f in found.values() for p in f.points),
    ]
    left.loglog(ends, ends, color=DENSE_COLOR, linewidth=1)
    left.set_xlabel("fitted KL, nats", fontsize=8)
    left.set_ylabel("measured KL, nats", fontsize=8)
    left.legend(frameon=False, fontsize=7)
    right.axhline(1, color=DENSE_COLOR, linewidth=1)
    right.set_xlabel("budget, tokens", fontsize=8)
    right.set_ylabel("measured / fitted", fontsize=8)
    return figure


def _policies(summary: Summary) -> list[str]:
    return list(dict.fromkeys(setting.policy for setting in summary.settings if setting.policy != "dense"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")

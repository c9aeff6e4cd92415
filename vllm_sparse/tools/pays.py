"""From which context sparse decode pays: times of one layer's kernels, measured or of committed benchmark rows."""

from __future__ import annotations

import json
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROWS = Path(__file__).with_name("kernel_rows.json")
"""Made by ``python -m benchmarks.kernel_rows`` from ``benchmarks/results``."""
USUAL_GPU = "NVIDIA H200"
"""Whose rows are taken where no GPU is found, or none of its kind was measured."""


@dataclass(frozen=True)
class Point:
    """One decode step of one layer on one rank."""

    context_tokens: int
    """Of all requests of the step together."""
    stock_us: float
    """What stock vLLM would run: it writes K and V of the new tokens and attends to whole contexts."""
    sparse_us: float
    """Writing, scoring, selecting and attending to what was chosen."""


@dataclass(frozen=True)
class Pays:
    """When decode steps of single requests get faster, as far as attention goes."""

    points: tuple[Point, ...]
    source: str
    """Where the times come from, in words."""
    measured: bool
    from_tokens: int | None
    """Context from which sparse is the faster; None: not within the contexts of these times."""

    def describe(self, layers: int, min_context_tokens: int) -> list[str]:
        """Lines for people; ``layers``: that run sparse. Contexts up to ``min_context_tokens`` run dense."""
        kind = "measured" if self.measured else "FORECAST, not measured here:"
        lines = [f"{kind} {self.source}"]
        if self.from_tokens is None:
            lines.append(f"does not pay up to {self.points[-1].context_tokens:,} tokens of context")
        else:
            least = max(self.from_tokens, min_context_tokens + 1)
            lines.append(f"pays from about {least:,} tokens of context of a single request, earlier in batches")
        for point in self.points:
            gain = (point.stock_us - point.sparse_us) * layers / 1e3
            lines.append(
                f"{point.context_tokens:>9,} tokens: {point.stock_us:7.1f} us a layer in stock, "
                f"{point.sparse_us:7.1f} sparse; {gain:+.2f} ms a step in {layers} layers"
            )
        return lines


def crossing(points: list[Point] | tuple[Point, ...]) -> int | None:
    """The context from which sparse stays the faster one, between the points around it in a straight line."""
    gains = [point.stock_us - point.sparse_us for point in points]
    if not gains or gains[-1] <= 0:
        return None
    last = max((index for index, gain in enumerate(gains) if gain <= 0), default=None)
    if last is None:
        return points[0].context_tokens
    low, high = points[last], points[last + 1]
    share = -gains[last] / (gains[last + 1] - gains[last])
    return round(low.context_tokens + share * (high.context_tokens - low.context_tokens))


@cache
def committed() -> list[dict]:
    """Rows of one layer's kernels: gpu, vllm, summary, kv_dtype, budget, dense_bytes, stock_us and sparse_us."""
    return json.loads(ROWS.read_text(encoding="utf-8"))


def forecast(gpu: str | None, summary: str, kv_dtype: str, token_bytes: int, contexts: list[int]) -> Pays | None:
    """What committed rows let expect, by bytes of K and V that stock reads; None where no row is alike.

    Args:
        gpu: name of the GPU, None where there is none.
        summary: of the decode policy.
        kv_dtype: ``fp8``, or another for 16 bits.
        token_bytes: K and V of one token in one layer on one rank.
        contexts: to say times for, rising.
    """
    kv = "fp8" if kv_dtype == "fp8" else "bf16"
    groups: dict[tuple, list[dict]] = {}
    for row in committed():
        if row["summary"] == summary:
            groups.setdefault((row["gpu"], row["kv_dtype"]), []).append(row)
    series = {key: _single(rows) for key, rows in groups.items()}
    usable = [key for key, rows in series.items() if len(rows) > 1] or [
        key for key, rows in groups.items() if len({row["dense_bytes"] for row in rows}) > 2
    ]
    if not usable:
        return None
    best = max(usable, key=lambda key: (key[0] == gpu, key[1] == kv, key[0] == USUAL_GPU))
    single = len(series[best]) > 1
    rows = series[best] if single else groups[best]
    curve = _between if single else _line
    stock, sparse = (curve([(row["dense_bytes"], row[of]) for row in rows]) for of in ("stock_us", "sparse_us"))
    points = tuple(Point(tokens, stock(tokens * token_bytes), sparse(tokens * token_bytes)) for tokens in contexts)
    versions = " and ".join(sorted({row["vllm"] for row in rows}))
    source = (
        f"{len(rows)} rows of {'' if single else 'batches in '}one layer on {best[0]}, vLLM {versions}, "
        f"KV {best[1]}, budget {rows[0]['budget']:,}, scaled by bytes of K and V"
    )
    return Pays(points, source, False, crossing(points))


def _single(rows: list[dict]) -> list[dict]:
    """Rows of single requests, by context."""
    return sorted((row for row in rows if row["batch_spec"].startswith("1q")), key=lambda row: row["dense_bytes"])


def _between(points: list[tuple[float, float]]):
    """Straight lines from point to point, and on beyond the first and the last."""
    xs = [x for x, _ in points]

    def at(x: float) -> float:
        index = min(max(bisect(xs, x), 1), len(xs) - 1)
        (x0, y0), (x1, y1) = points[index - 1 : index + 1]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    return at


def _line(points: list[tuple[float, float]]):
    """The straight line that fits ``points`` best in relative terms: short steps count as much as long ones."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return lambda x: mean_y + slope * (x - mean_x)

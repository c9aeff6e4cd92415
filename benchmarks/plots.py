"""Draw docs/*.png from committed results: ``python -m benchmarks.plots``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
STOCK, SPARSE = "#8a8f98", "#1f77b4"


def load(name: str) -> list[dict]:
    """Rows of one results file; of several runs of the same measurement the last counts."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return list({(r["bench"], r["batch_spec"], r.get("kernel"), r["tp"]): r for r in rows}.values())


def caption(row: dict) -> str:
    return f"{row['gpu']}, vLLM {row['vllm']}, commit {row['commit']}, {row['date']}"


def decode_speed() -> None:
    """Time per output token of the real engine, stock against sparse."""
    rows = [row for row in load("engine") if row["bench"] == "tpot"]
    rows.sort(key=lambda row: (row["batch"], row["context"]))
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, key, color, name in (
        (-0.2, "baseline_ms", STOCK, "stock vLLM (FLASH_ATTN)"),
        (0.2, "sparse_ms", SPARSE, f"vllm-sparse, budget {rows[0]['budget']:,} tokens"),
    ):
        bars = axes.bar(
            [i + offset for i in range(len(rows))], [row[key] for row in rows], 0.38, color=color, label=name
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    names = [f"{row['batch']} × {row['context']:,}\n{row['speedup']:.2f}×" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylabel("ms per output token")
    axes.set_title(f"Decode of the {rows[0]['shape']} shape, requests × context", fontsize=10)
    axes.set_xlabel(caption(rows[0]), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "decode_speed.png", dpi=160)


def kernel_time() -> None:
    """One layer's decode step by kernel, beside dense attention."""
    rows = load("kernels")
    specs = list(dict.fromkeys(row["batch_spec"] for row in rows))
    times = {(row["batch_spec"], row["kernel"]): row["us"] for row in rows}
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for index, spec in enumerate(specs):
        dense = axes.barh(index + 0.2, times[spec, "dense_fa3"], 0.36, color=STOCK, label="dense FlashAttention-3")
        axes.bar_label(dense, fmt="%.0f", fontsize=8)
        left = 0.0
        for kernel, color in (("score", "#1f77b4"), ("select", "#6baed6"), ("attend_triton", "#c6dbef")):
            axes.barh(index - 0.2, times[spec, kernel], 0.36, left=left, color=color, label=kernel)
            left += times[spec, kernel]
        axes.text(left, index - 0.2, f" {left:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(specs)), specs)
    axes.invert_yaxis()
    axes.set_xlabel(f"µs per layer; {caption(rows[0])}", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "kernel_time.png", dpi=160)


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    decode_speed()
    kernel_time()

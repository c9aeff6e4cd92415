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


def load(name: str, bench: str) -> list[dict]:
    """Rows of the fullest run of ``bench`` on the GPU measured last; rows with a note are of runs cut off."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["bench"] == bench and "note" not in row]
    runs: dict[str, dict] = {}
    for row in rows:
        if row["gpu"] == rows[-1]["gpu"]:
            key = row["batch_spec"], row.get("kernel"), row["tp"]
            runs.setdefault(row["commit"], {})[key] = row
    return list(max(reversed(runs.values()), key=len).values())


def caption(row: dict) -> str:
    return f"{row['gpu']}, vLLM {row['vllm']}, commit {row['commit']}, {row['date']}"


def decode_speed() -> None:
    """Time per output token of the real engine, stock against sparse."""
    rows = load("engine", "tpot")
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
    """One layer's decode step of one request against its context, beside dense attention and memory speed."""
    rows = [row for row in load("kernels", "attention") if row["batch"] == 1]
    rows.sort(key=lambda row: row["context"])
    contexts = sorted({row["context"] for row in rows})
    bandwidth = max(row["tb_per_s"] for row in rows)
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for kernel, style, color, name in (
        ("dense_fa3", "-", STOCK, "dense FlashAttention-3"),
        ("sparse_step", "-", SPARSE, "sparse: score + select + attend"),
        ("score", ":", "#1f77b4", "score"),
        ("select", "--", "#6baed6", "select"),
        ("attend_triton", "-.", "#9ecae1", "attend"),
    ):
        times = {row["context"]: row for row in rows if row["kernel"] == kernel}
        axes.plot(contexts, [times[n]["us"] for n in contexts], style, color=color, label=name, marker=".")
        if kernel in ("dense_fa3", "sparse_step"):
            bound = [times[n]["tb_per_s"] * times[n]["us"] / bandwidth for n in contexts]
            axes.plot(contexts, bound, color=color, alpha=0.3, linewidth=4, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    names = [f"{n >> 10}K" if n < 1 << 20 else f"{n >> 20}M" for n in contexts]
    axes.set_xticks(contexts, names)
    axes.set_ylabel("µs per layer")
    note = f"bands: their bytes at {bandwidth:.1f} TB/s, the most any of them reached"
    axes.set_xlabel(f"tokens of context; {note}\n{caption(rows[0])}", fontsize=8)
    axes.set_title(f"One request, {rows[0]['shape']}, budget {rows[0]['budget']:,} tokens", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "kernel_time.png", dpi=160)


def prefill_time() -> None:
    """One layer's prefill of one request by part, beside dense attention."""
    rows = [row for row in load("prefill", "prefill_attention") if row["kernel"] == "fa3"]
    rows.sort(key=lambda row: row["context"])
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for index, row in enumerate(rows):
        dense = axes.barh(index + 0.2, row["baseline_ms"], 0.36, color=STOCK, label="dense FlashAttention-3")
        axes.bar_label(dense, fmt="%.1f", fontsize=8)
        left = 0.0
        for part, color in (("estimate", "#1f77b4"), ("table", "#6baed6"), ("attend", "#c6dbef")):
            # What is left over between events can be a little less than nothing.
            width = max(row[f"{part}_ms"], 0.0)
            axes.barh(index - 0.2, width, 0.36, left=left, color=color, label=part)
            left += width
        axes.text(left, index - 0.2, f" {left:.1f} at density {row['density']:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['context']:,} tokens" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"ms per layer, random data, chunks of {rows[0]['chunk']:,}; {caption(rows[0])}", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "prefill_time.png", dpi=160)


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    decode_speed()
    kernel_time()
    prefill_time()

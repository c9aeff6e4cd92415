"""Draw docs/*.png and build/quality_*.html from committed results: ``python -m benchmarks.plots``."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import RESULTS
from benchmarks.tables import DTYPES, caption, decodes, fullest, read
from vllm_sparse.policies import DECODE_POLICIES, PREFILL_POLICIES
from vllm_sparse.tools.eval import report
from vllm_sparse.tools.eval.samples import TEXT
from vllm_sparse.tools.eval.settings import Setting
from vllm_sparse.tools.eval.summary import Summary

ROOT = Path(__file__).parent.parent
DOCS, PAGES = ROOT / "docs", ROOT / "build"
STOCK, SPARSE = "#8a8f98", "#1f77b4"


def joint_caption(rows: list[dict]) -> str:
    """Of rows of several commits."""
    return caption(rows[-1] | {"commit": ", ".join(dict.fromkeys(row["commit"] for row in rows))})


def decode_speed() -> None:
    """Time per output token of the real engine, stock against sparse."""
    rows = decodes()
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, key, color, name in (
        (-0.2, "baseline_ms", STOCK, "stock vLLM (FLASH_ATTN)"),
        (0.2, "sparse_ms", SPARSE, f"vllm-sparse, {rows[0]['policy']}, budget {rows[0]['budget']:,} tokens"),
    ):
        bars = axes.bar(
            [i + offset for i in range(len(rows))], [row[key] for row in rows], 0.38, color=color, label=name
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    names = [f"{row['batch']} × {row['context']:,}\n{row['speedup']:.2f}×" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylabel("ms per output token")
    about = f"Decode of the {rows[0]['shape']} shape, KV cache in {rows[0]['kv_dtype']}"
    axes.set_title(f"{about}, requests × context", fontsize=10)
    axes.set_xlabel(caption(rows[0]), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "decode_speed.png", dpi=160)


def tensor_parallel() -> None:
    """Time per output token on several GPUs, stock against sparse; no plot until some were measured."""
    rows = [row for row in read("engine", "tpot") if row["tp"] > 1]
    if not rows:
        return
    each = ("shape", "executor", "batch_spec")
    rows = fullest(rows, ("gpu", "commit", "tp", "budget", "sparse", *DTYPES), each)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    rows.sort(key=lambda row: (shapes.index(row["shape"]), row["executor"], row["batch"], row["context"]))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.55 * len(rows)), layout="constrained")
    for offset, key, color, name in (
        (-0.2, "baseline_ms", STOCK, "stock vLLM (FLASH_ATTN)"),
        (0.2, "sparse_ms", SPARSE, f"vllm-sparse, budget {rows[0]['budget']:,} tokens"),
    ):
        bars = axes.barh([i + offset for i in range(len(rows))], [row[key] for row in rows], 0.38, color=color)
        bars.set_label(name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    names = [
        f"{row['shape']}, {row['executor']}\n{row['batch']} × {row['context']:,}: {row['speedup']:.2f}×"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms per output token, tensor parallel {rows[0]['tp']}; {caption(rows[0])}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "tensor_parallel.png", dpi=160)


def offload() -> None:
    """Decode throughput with K and V in CPU memory, beside stock vLLM where it ran in the same run."""
    latest: dict[tuple, dict] = {}
    for row in read("offload", "offload"):
        # A run beside stock says more than a later one without.
        coded = tuple(row.get(name) == "fp8" for name in ("host_dtype", "kv_dtype"))
        key = row["mode"], row["batch_spec"], row["gpu_gib"], coded
        if row["mode"] == "offload" and ("baseline_ms" in row or "baseline_ms" not in latest.get(key, ())):
            latest[key] = row
    rows = sorted(latest.values(), key=lambda row: (row["batch"], row["context"], row["gpu_gib"] or 999))
    figure, axes = plt.subplots(figsize=(10, 3.4), layout="constrained")
    names = []
    for i, row in enumerate(rows):
        axes.bar_label(axes.bar(i + 0.2, row["tokens_per_s"], 0.38, color=SPARSE), fmt="%.0f", fontsize=8)
        if "baseline_ms" in row:
            speed = row["batch"] / row["baseline_ms"] * 1e3
            axes.bar_label(axes.bar(i - 0.2, speed, 0.38, color=STOCK), fmt="%.0f", fontsize=8)
        gpu = f"{row['gpu_gib']:.0f} GiB of GPU" if row["gpu_gib"] else "whole GPU"
        coded = " in fp8" if "fp8" in (row.get("host_dtype"), row.get("kv_dtype")) else ""
        names.append(f"{row['batch']} × {row['context']:,}\n{gpu},\n{row['host_gib']:.0f} GiB of host{coded}")
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("tokens per second")
    axes.set_xlabel(joint_caption(rows), fontsize=8)
    axes.set_title(
        f"Decode of the {rows[0]['shape']} shape with offload (grey: stock in the same run)", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "offload.png", dpi=160)


def kernel_time() -> None:
    """One layer's decode step of one request against its context, beside dense attention and memory speed."""
    rows = [row for row in read("kernels", "attention") if row["batch"] == 1 and not row.get("tuning")]
    rows = fullest(rows, ("gpu", "commit", "policy", *DTYPES), ("batch_spec", "kernel", "tp"))
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


def selectors() -> None:
    """Attention held by the chosen pages of each decode policy, and the output's error, against the budget."""
    rows = [row for row in read("selectors", "selectors") if row["split"] == "report"]
    rows = fullest(rows, ("shape", "context", "commit"), ("text", "policy", "budget"))
    texts = sorted({row["text"] for row in rows})
    figure, axes = plt.subplots(1, len(texts), figsize=(11, 3.8), layout="constrained", sharey=True)
    for place, text in zip(axes, texts, strict=True):
        for index, name in enumerate(name for name in DECODE_POLICIES if name not in ("oracle", "random")):
            line = [row for row in rows if (row["text"], row["policy"]) == (text, name)]
            line.sort(key=lambda row: row["budget"])
            if line:
                x, y = [row["budget"] for row in line], [100 * row["mass"] for row in line]
                style = {"linewidth": 2.5} if name.startswith("sketch") else {"linestyle": "--", "linewidth": 1}
                place.plot(x, y, marker=".", color=f"C{index}", label=name, **style)
        place.set_xscale("log", base=2)
        budgets = sorted({row["budget"] for row in rows})
        place.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        place.set_title(text, fontsize=10)
        place.set_xlabel("budget, tokens", fontsize=8)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("% of the oracle's attention")
    axes[-1].legend(frameon=False, fontsize=8)
    about = f"{rows[0]['shape']}, {rows[0]['context']:,} tokens, pages of {rows[0]['page_size']}"
    figure.suptitle(f"Attention on the pages chosen ({about}; {caption(rows[0])})", fontsize=9)
    figure.savefig(DOCS / "selectors.png", dpi=160)


def prefill_time() -> None:
    """One layer's prefill of one request by part, beside dense attention."""
    rows = read("prefill", "prefill_attention")
    rows = [row for row in rows if row["kernel"] == "fa3" and row["policy"] == "vertical_slash"]
    rows = fullest(rows, ("gpu", "commit", "sparse", *DTYPES), ("batch_spec",))
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


def prefill_quality() -> None:
    """What each prefill policy loses on text: against its density, and against a layer's time at that density."""
    rows = [json.loads(line) for line in (RESULTS / "eval_prefill_cpu.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["prefill_policy"] != "dense"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    times = prefill_times()
    figure, axes = plt.subplots(1, len(models) + 1, figsize=(12.5, 4.4), layout="constrained")
    least = min(row["chunk"] for row in rows)
    curves = dict.fromkeys((row["model"], row["prefill_policy"], row["chunk"]) for row in rows)
    for model, name, chunk in curves:
        line = [row for row in rows if (row["model"], row["prefill_policy"], row["chunk"]) == (model, name, chunk)]
        if len(line) < 2:  # a check that chunks do not matter
            continue
        line.sort(key=lambda row: row["prefill_density"])
        densities, y = [row["prefill_density"] for row in line], [perplexity_percent(row) for row in line]
        shares = [100 * (times[name]["first"] + times[name]["for_density"] * density) for density in densities]
        label, style = (name, "-") if chunk == least else (f"{name}, chunks of {chunk:,}", "--")
        look = {
            "color": f"C{list(PREFILL_POLICIES).index(name)}",
            "linestyle": style,
            "marker": "o",
            "markersize": 4,
        }
        heavy = {"linewidth": 2.5, "zorder": 3} if name == "sampled_queries" else {"linewidth": 1.2}
        places = [(axes[models.index(model)], densities)]
        places += [(axes[-1], shares)] if model == models[0] else []
        for place, x in places:
            place.plot(x, y, label=label, **look, **heavy)
            for row, at, up in zip(line, x, y, strict=True):
                if name == "sampled_queries":
                    place.annotate(f" {row['top_p']}", (at, up), fontsize=8)
    for model, place in zip(models, axes, strict=False):
        length = next(row["length"] for row in rows if row["model"] == model)
        place.set_title(f"{model}, {length:,} tokens, all chunks sparse", fontsize=9)
        place.set_xlabel("density", fontsize=8)
        place.set_xlim(0, 0.7)
    axes[0].set_ylabel("perplexity, % above dense")
    axes[-1].set_title(f"{models[0]}'s loss, a layer's time at 131,072", fontsize=9)
    axes[-1].set_xlabel("choice and attention, % of dense FlashAttention-3's time", fontsize=8)
    axes[-1].axvline(100, color=STOCK, linewidth=1)
    for place in axes:
        place.axhline(0, color=STOCK, linewidth=1)
        place.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8)
    about = [f"loss: {joint_caption([row | {'gpu': 'none'} for row in rows])}"]
    about += dict.fromkeys(f"time: {caption(times[row['prefill_policy']])}" for row in rows)
    figure.supxlabel("\n".join(about), fontsize=7)
    figure.savefig(DOCS / "prefill_quality.png", dpi=140)


def perplexity_percent(row: dict) -> float:
    return 100 * math.expm1(row["loss"] - row["dense_loss"])


def prefill_times() -> dict[str, dict]:
    """Of each policy, its newest row at 131,072 tokens, with a layer's time as a share of dense attention's: what
    a choice takes, ``first``, and attention, ``for_density``, each the median over its densities."""
    rows = [row for row in read("prefill", "prefill_attention") if row["kernel"] == "fa3"]
    rows = [row for row in rows if row["context"] == 131072]
    found = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        own = [row for row in own if all(row.get(key) == own[-1].get(key) for key in ("commit", *DTYPES))]
        first = statistics.median((row["sparse_ms"] - row["attend_ms"]) / row["baseline_ms"] for row in own)
        slope = statistics.median(row["attend_ms"] / row["baseline_ms"] / row["density"] for row in own)
        found[policy] = own[-1] | {"first": first, "for_density": slope}
    return found


def decode_quality() -> None:
    """What decode budgets cost two small models: answers found, divergence and loss, from ``vllm-sparse eval``."""
    rows = evaluation()
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for panels, model in zip(axes, dict.fromkeys(row["model"] for row in rows), strict=True):
        own = [row for row in rows if row["model"] == model]
        found = Summary([row for row in own if row["length"] == max(r["length"] for r in own)])
        needles = [task for task in found.tasks if task.startswith("niah")]
        quantities = (
            (f"needles found, %: mean of {len(needles)} tasks", needles, "score", 100),
            ("KL to dense, nats", [TEXT], "kl", 1),
            ("loss less dense loss, nats", [TEXT], "excess", 1),
        )
        for place, (title, tasks, name, scale) in zip(panels, quantities, strict=True):
            for index, policy in enumerate(name for name in DECODE_POLICIES if name not in ("dense", "random")):
                points = [
                    (setting.budget, scale * sum(values) / len(values))
                    for setting in found.settings
                    if setting.policy == policy
                    and None not in (values := [found.mean(setting, task, name) for task in tasks])
                ]
                if points:
                    heavy = {"linewidth": 2.5} if policy in ("sketch", "sketch2") else {"linewidth": 1}
                    style = "--" if policy == "oracle" else "-"
                    place.plot(
                        *zip(*points, strict=True), style, marker=".", color=f"C{index}", label=policy, **heavy
                    )
            if name == "score":
                dense = [found.mean(Setting(), task, name) for task in tasks]
                place.axhline(scale * sum(dense) / len(dense), color=STOCK, label="dense")
                place.set_ylim(0, 100)
            if name == "kl":
                place.set_yscale("log")
            budgets = sorted({setting.budget for setting in found.settings if setting.budget})
            place.set_xscale("log", base=2)
            place.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
            place.set_title(f"{title}\n{model}, {found.lengths[0]:,} tokens", fontsize=9)
            place.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    about = joint_caption([row | {"gpu": row["device"]} for row in rows])
    figure.supxlabel(f"budget, tokens per KV head; dense prefill; {about}", fontsize=8)
    figure.savefig(DOCS / "decode_quality.png", dpi=120)


def quality_pages() -> None:
    """The page of ``vllm-sparse eval`` for each model, which is too large to be committed."""
    rows = evaluation()
    PAGES.mkdir(exist_ok=True)
    for model in dict.fromkeys(row["model"] for row in rows):
        report.write(PAGES / f"quality_{model}.html", Summary([row for row in rows if row["model"] == model]))


def evaluation() -> list[dict]:
    """Rows of ``vllm-sparse eval`` on a GPU, of decode policies alone."""
    with gzip.open(RESULTS / "eval_h100.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    chunk = max(row["chunk"] for row in rows)
    return [
        row for row in rows if row["prefill_policy"] == "dense" and not row["sparse"] and row["chunk"] == chunk
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    DOCS.mkdir(exist_ok=True)
    decode_speed()
    tensor_parallel()
    offload()
    kernel_time()
    selectors()
    prefill_time()
    prefill_quality()
    decode_quality()
    quality_pages()

"""Tables of measured speeds and the README's sentence, from results: ``python -m benchmarks.tables``."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import RESULTS
from benchmarks.shapes import SHAPES
from vllm_sparse.config import SparseConfig
from vllm_sparse.tools.markdown import table

ROOT = Path(__file__).parent.parent
README, SPEED = ROOT / "README.md", ROOT / "docs" / "benchmarks" / "speed.md"
COMMAND = "python -m benchmarks.tables"
DTYPES = ("kv_dtype", "baseline_kv_dtype", "weights")
"""Rows that differ in these are never compared; old ones have none and are of bf16."""
MACHINE = ("gpu", "vllm", "tp", "shape", "weights")
"""What rows of one table share."""
SETTINGS = ("batch", "context", "policy", "budget", "prefill_policy", "sparse", "chunk_tokens", "drafts", *DTYPES)
"""What else tells one measurement from another."""
OF_PREFILL = ("prefill", "min_prefill", "slash", "vertical", "probe")
"""How settings begin that a step of decode does not depend on."""
MAIN_SHAPE = SHAPES["llama-8b"][0]
"""Of the README's run."""
HEADLINE = re.compile(rf"(?<=<!-- Made by `{COMMAND}`. -->\n).*?(?=<!-- -->)", re.DOTALL)
"""Where it stands in the README."""


def read(name: str, bench: str) -> list[dict]:
    """All rows of ``bench``; rows with a note are of runs cut off."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["bench"] == bench and "note" not in row]


def key(row: dict, names: tuple[str, ...]) -> str:
    """The values of ``names`` in a row, as one that can be compared."""
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def fullest(rows: list[dict], same: tuple[str, ...], each: tuple[str, ...]) -> list[dict]:
    """Of the groups of rows equal in ``same`` the one with most points, each as measured last.

    Points differ in ``each``. Among equally large groups the one begun last is taken.
    """
    groups: dict[str, dict] = {}
    for row in rows:
        groups.setdefault(key(row, same), {})[key(row, each)] = row
    return list(max(reversed(groups.values()), key=len).values())


def newest(rows: list[dict]) -> list[dict]:
    """Rows of the newest vLLM that are beside stock's, each as measured last."""
    rows = [row for row in rows if row["baseline_ms"] is not None]
    latest = max(map(release, rows))
    return list({key(_told(row), (*MACHINE, *SETTINGS)): row for row in rows if release(row) == latest}.values())


def _told(row: dict) -> dict:
    """``row``, one of decode steps without what chose pages in the prefill before them."""
    if row["bench"] not in ("tpot", "verification"):
        return row
    settings = {name: value for name, value in row["sparse"].items() if not name.startswith(OF_PREFILL)}
    return row | {"prefill_policy": None, "sparse": settings}


def release(row: dict) -> tuple[int, ...]:
    return tuple(int(number) for number in row["vllm"].split(".")[:2])


def decodes() -> list[dict]:
    """The README's run: of one GPU with the newest vLLM, fp8 caches on both sides and default settings.

    Until the default policy of today was measured so, it is that of the rows there are.
    """
    rows = [row for row in newest(read("engine", "tpot")) if row["tp"] == 1 and row["default"]]
    rows = [row for row in rows if row["shape"] == MAIN_SHAPE]
    rows = [row for row in rows if row["kv_dtype"] == row["baseline_kv_dtype"] == "fp8" and not row["drafts"]]
    rows = [row for row in rows if row["policy"] == SparseConfig().decode_policy] or rows
    rows = fullest(rows, ("gpu", "commit", *DTYPES), ("batch_spec",))
    return sorted(rows, key=lambda row: (row["batch"], row["context"]))


def caption(row: dict) -> str:
    device = "CPU" if row["gpu"] == "none" else row["gpu"]
    return f"{device}, vLLM {row['vllm']}, commit {row['commit']}, {row['date']}"


def headline() -> str:
    """The README's sentence: the run of eight requests, else the largest of :func:`decodes`."""
    rows = decodes()
    row = next((row for row in rows if row["batch"] == 8), rows[-1])
    contexts = " and random contexts" if row.get("decode_only") else ""
    said = (
        f"**{row['speedup']:.2f} times the decode speed of stock vLLM, both with an fp8 KV cache**: a "
        f"decode step of {row['batch']} requests with {row['context']:,} tokens of context each takes "
        f"{row['sparse_ms']:.2f} ms instead of {row['baseline_ms']:.2f} ms ({caption(row)}; {row['baseline']} "
        f"with CUDA graphs against `{row['policy']}` with a budget of {row['budget']:,} tokens; {row['shape']} "
        f"shape, random weights in {row['weights']}{contexts}, one run)."
    )
    return textwrap.fill(said, 120, break_on_hyphens=False) + "\n"


def with_headline(readme: str) -> str:
    """``readme`` with the sentence of today's results."""
    return HEADLINE.sub(lambda _: headline(), readme)


BEGIN = """\
# Speed

Stock vLLM and this backend on the same machine, one after the other, by the method of [Benchmarks](index.md).
Weights are random, which says nothing of answers: those are in [Quality](../quality.md). Older numbers are in
[Measured on vLLM 0.26](history.md).

![Time per output token with an fp8 KV cache: stock and sparse](../decode_speed.png)

## Time per output token

† Contexts are random keys and values that no prefill computed, which changes nothing of a step.

With six requests stock takes longer per token of context than with one or eight, and [why is not
known](notes.md#six-requests): do not expect these factors elsewhere.
"""
MIXES = """\
## Prompts of mixed lengths

Prompts of 1,024 to 65,536 tokens, log-uniform, sent at once; each is answered with 256 tokens. The time per
output token is that of steps in which all decode.
"""
DRAFTS = """\
## Drafts

Steps that verify n-gram drafts of every request, all of them rejected, so that a step is a step on both sides.
"""
COPIES = """\
A small model copies code that it has read, with n-gram drafts, on a CPU: only the tokens a step count here.
"""


def page() -> str:
    """``docs/benchmarks/speed.md``."""
    return "\n".join([
        f"<!-- Made by `{COMMAND}` from benchmarks/results; edits are lost. -->",
        BEGIN,
        *_engine("tpot", lambda row: f"`{row['policy']}`, {row['budget']:,}", "ms"),
        "## Time to the first token\n",
        *_engine("ttft", lambda row: f"`{row['prefill_policy']}`", "s"),
        "## Tokens that the cache holds\n",
        *table(("GPU", "KV cache", "policy", "stock", "sparse", ""), _capacities()),
        "",
        MIXES,
        *_mixes(),
        DRAFTS,
        *_engine("verification", lambda row: f"`{row['policy']}`, {row['budget']:,}", "ms"),
        COPIES,
        *table(("backend", "policy", "drafts", "tokens a step"), _drafts()),
        "",
    ])  # fmt: skip


def _requests(row: dict) -> str:
    return f"{row['batch']} × {row['context']:,}"


def _engine(bench: str, chosen: Callable[[dict], str], unit: str) -> list[str]:
    """One table for each machine of ``benchmarks/results/engine.jsonl``."""
    groups: dict[str, list[dict]] = {}
    for row in newest(read("engine", bench)):
        groups.setdefault(key(row, MACHINE), []).append(row)
    lines = []
    for rows in groups.values():
        first = rows[0]
        gpus = f"{first['tp']} × {first['gpu']}" if first["tp"] > 1 else first["gpu"]
        shape = re.sub(r"( with .*)?$", r" shape\1", first["shape"], count=1)
        lines += [f"{gpus}, vLLM {first['vllm']}, {shape}, weights in {first['weights']}:", ""]
        rows.sort(key=lambda row: (row["kv_dtype"] != "fp8", row["policy"], row["batch"], row["context"]))
        head = ("requests × tokens", "KV cache", "sparse runs", "stock", "sparse", "", "commit")
        lines += [*table(head, (_line(row, chosen(row), unit) for row in rows)), ""]
    return lines


def _line(row: dict, chosen: str, unit: str) -> tuple[str, ...]:
    cache = row["kv_dtype"]
    if row["baseline_kv_dtype"] != cache:
        cache += f", stock {row['baseline_kv_dtype']}"
    drafts = f", {row['drafts']} drafts" if row["drafts"] else ""
    if row["bench"] == "ttft" and row["prefill_density"] is not None:
        chosen += f", density {row['prefill_density']:.3f}"
    times = (f"{row[name] / (1000 if unit == 's' else 1):.2f} {unit}" for name in ("baseline_ms", "sparse_ms"))
    requests = _requests(row) + (" †" if row.get("decode_only") else "")
    return requests, cache, chosen + drafts, *times, f"**{row['speedup']:.2f}×**", row["commit"]


def _capacities() -> list[tuple[str, ...]]:
    rows = [row for row in read("engine", "tpot") if row.get("kv_tokens") and row["baseline_kv_tokens"]]
    found = {}
    for row in newest(rows):
        stock, sparse = row["baseline_kv_tokens"], row["kv_tokens"]
        line = (row["gpu"], row["kv_dtype"], f"`{row['policy']}`", f"{stock:,}", f"{sparse:,}")
        found[line[:3]] = (*line, f"{sparse / stock:.2f}×")
    return sorted(found.values())


def _mixes() -> list[str]:
    """One table for each machine and settings of ``benchmarks/results/mix.jsonl``."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in newest(read("mix", "throughput")):
        about = (
            f"{caption(row)}, {row['shape']} shape, weights in {row['weights']}, KV cache in {row['kv_dtype']} "
            f"(stock: {row['baseline_kv_dtype']}), chunks of {row['chunk_tokens']:,} tokens; `{row['policy']}` "
            f"and `{row['prefill_policy']}` with `{json.dumps(row['sparse'])}`:"
        )
        lines = groups.setdefault(about, [])
        for what, name, shown in (
            ("output", "tokens_per_s", "{:,.0f} tokens/s"),
            ("time per output token", "ms", "{:.2f} ms"),
            ("until every first token was there", "all_first_tokens_s", "{:.2f} s"),
        ):
            stock, sparse = row[f"baseline_{name}"], row[f"sparse_{name}"]
            gain = sparse / stock if what == "output" else stock / sparse
            prompts = f"{row['batch']}, {row['prompt_tokens']:,} tokens in all"
            lines.append((prompts, what, shown.format(stock), shown.format(sparse), f"**{gain:.2f}×**"))
    head = ("prompts at once", "", "stock", "sparse", "")
    return [line for about, lines in groups.items() for line in (about, "", *table(head, lines), "")]


def _drafts() -> list[tuple[str, ...]]:
    rows = {key(row, ("backend", "policy", "drafts")): row for row in read("drafts", "drafts")}
    return [
        (
            row["backend"],
            f"`{row['policy']}`" if row["policy"] else "",
            str(row["drafts"]),
            f"{row['tokens_per_step']:.1f}",
        )
        for row in rows.values()
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    SPEED.write_text(page(), encoding="utf-8")
    README.write_text(with_headline(README.read_text(encoding="utf-8")), encoding="utf-8")

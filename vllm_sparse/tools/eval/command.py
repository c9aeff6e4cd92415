"""`vllm-sparse eval MODEL`: arguments, and what is refused before anything is measured."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies.registry import DECODE_POLICIES, PREFILL_POLICIES
from vllm_sparse.tools import commands
from vllm_sparse.tools.eval import pairs, qa, samples, settings, summary, tasks
from vllm_sparse.tools.eval.rows import Rows
from vllm_sparse.tools.eval.run import Run
from vllm_sparse.tools.eval.settings import Setting
from vllm_sparse.tools.eval.tasks import LOSSES, PREFILL_TEXT, TEXT

LENGTHS = (4096, 8192, 16384, 32768)
LEAST_LENGTH = 256
CPU_CHUNK, GPU_CHUNK, GPU_BATCH = 2048, 8192, 8
MOST_SAMPLES, MOST_CHUNK, MOST_BATCH = 10_000, 1 << 20, 1024
BUDGETS = [256, 512, 1024, 2048]
TASKS = [TEXT, "niah_single_2"]


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure what budgets and policies cost in quality",
        description="Measure what budgets and policies cost a model in quality, through the real engine: loss and "
        "divergence from dense of the last tokens of long texts, RULER's tasks, conversations, turns about a "
        "shared text, programs to trace, and the attention mass of the chosen pages. Leaves JSON lines and an "
        "HTML page. An interrupted run continues when it is repeated.",
    )
    parser.set_defaults(run=run)
    commands.add_model_options(parser)
    decode = [name for name in DECODE_POLICIES if name != "dense"]

    names, whole, real, several = commands.several(str), commands.whole, commands.real, commands.several

    def option(name: str, about: str, kind: Callable, **more) -> None:
        parser.add_argument(name, type=kind, help=about, **more)

    option("--policies", f"of decode, with commas; default: {','.join(decode)}", names)
    option("--budgets", f"tokens; default: {','.join(map(str, BUDGETS))}", several(whole(1)))
    option(
        "--prefill-policies",
        f"of prefill, alone and with each of decode; default: dense; known: {','.join(PREFILL_POLICIES)}",
        names,
    )
    option("--top-p", "of prefill policies that estimate; default: 0.98", several(real(0, 1)))
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), type=settings.parse,
        help="instead: two settings on the same samples, each `dense`, a preset or a policy with or without "
        ":BUDGET, or a JSON object as for --sparse; prints what B lost",
    )  # fmt: skip
    known = ",".join(dict.fromkeys((*tasks.TASKS, *tasks.GROUPS)))
    option(
        "--tasks", f"tasks and groups of them; default: {','.join(TASKS)}; known: {known}", names, default=TASKS
    )
    for name, task in (("squad", "qa_1"), ("hotpotqa", "qa_2")):
        option(f"--{name}", f"JSON file of {qa.NAMES[name]}, for {task}", Path)
    option(
        "--lengths", "tokens of prompt and answer; default: 4096 to 32768, as the model takes", several(whole(1))
    )
    option(
        "--passages",
        f"samples of {TEXT} and {PREFILL_TEXT} per length; default: 2",
        whole(1, MOST_SAMPLES),
        default=2,
    )
    option("--score-tokens", "last tokens of a text, which are scored; default: 256", whole(1), default=256)
    option(
        "--needles", "samples of each other task per length, spread over depths; default: 5",
        whole(1, MOST_SAMPLES), default=5,
    )  # fmt: skip
    parser.add_argument(
        "--split",
        choices=samples.SPLITS,
        default="report",
        help="half of the text and of the seeds: choose settings on dev, publish report",
    )
    option("--recall-every", "decode steps of a text between two that are weighed; 0: none", whole(), default=16)
    option(
        "--kv-cache-dtype-skip-layers",
        "layers left out of it, as for `vllm serve`: numbers, or sliding_window, with commas; default: none",
        names,
    )
    option("--sparse", "further sparse settings of all runs, as JSON", commands.json_object, default={})
    option("--out", "results; the page is beside them; default: eval.jsonl", Path, default=Path("eval.jsonl"))
    option("--chunk", "tokens of a step of prefill; default: 8192, on a CPU 2048", whole(1, MOST_CHUNK))
    option("--batch", "samples at a time; default: 8, on a CPU 1", whole(1, MOST_BATCH))
    share = real(0, 1, above=True)
    option("--gpu-memory-utilization", "as for `vllm serve`; default: 0.8", share, default=0.8)


def run(args: argparse.Namespace) -> None:
    """Measure what was not measured before, then write the page and print tables.

    Raises:
        ConfigError: an argument that cannot be used; names it, its value and what is allowed.
    """
    found = _checked(args)
    report = _report()
    commands.check_writable(args.out)
    commands.check_writable(args.out.with_suffix(".html"))
    commands.stay_in_process()
    # Logits processors of one kind only; vLLM's second runner has another interface for them.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    model = commands.model_config(args)
    _settle(args, found, model)
    text = commands.sample_text(args.text)
    run = Run(args, found, text, Rows(args.out))
    run.check_samples(commands.tokenizer(args, model))
    run.all()
    *others, (cache, mine) = run.by_cache().items()
    results = summary.Summary(mine)
    page = args.out.with_suffix(".html")
    report.write(page, results)
    print(f"\n{summary.table(results)}\n\n{pairs.table(results)}\n")
    if args.compare:
        print(f"{pairs.comparison(results, *found[-2:])}\n")
    for other, rows in others:
        print(f"{cache} less {other}, on the same samples:\n\n{pairs.caches(summary.Summary(rows), results)}\n")
    print(f"Results are in {args.out}, plots in {page}")


def _report():
    """The module that writes the page; asked for before minutes of measuring."""
    try:
        from vllm_sparse.tools.demo import packages  # noqa: F401  the progress bar
        from vllm_sparse.tools.eval import report
    except ImportError as error:
        raise ConfigError(
            f"{error}, which the page and the progress bar need. In a checkout: pip install '.[eval]'"
        ) from None
    return report


def _checked(args: argparse.Namespace) -> list[Setting]:
    """The settings asked for, of a comparison its two last; refuses what needs no model to be refused."""
    files = {name: path for name in qa.READERS if (path := getattr(args, name)) is not None}
    args.tasks = tasks.named(args.tasks, set(files))
    args.questions = {name: qa.read(path, name, args.split) for name, path in files.items()}
    if args.out.suffix == ".html":
        raise ConfigError(f"--out: {args.out} is where the page would go; allowed: another ending, such as .jsonl")
    offloads = [mapping.get("offload") is not None for mapping in (args.sparse, *(args.compare or ()))]
    if any(task in args.tasks for task in LOSSES) and any(offloads):
        raise ConfigError(
            f"--tasks: {TEXT} and {PREFILL_TEXT} are compared with dense attention, which offload refuses; "
            f"allowed with offload: {', '.join(tasks.PROBLEMS)}"
        )
    found = _settings(args)
    if PREFILL_TEXT in args.tasks and all(setting.prefill_policy == "dense" for setting in found):
        raise ConfigError(
            f"--tasks: {PREFILL_TEXT} where every setting has dense prefill; allowed with --prefill-policies, or "
            f"with prefill_policy in --compare"
        )
    return found


def _settings(args: argparse.Namespace) -> list[Setting]:
    grid = ("policies", "budgets", "prefill_policies", "top_p")
    if not args.compare:
        everything = [name for name in DECODE_POLICIES if name != "dense"]
        for name, default in zip(grid, (everything, BUDGETS, ["dense"], [0.98]), strict=True):
            if getattr(args, name) is None:
                setattr(args, name, default)
        return settings.grid(args.policies, args.budgets, args.prefill_policies, args.top_p, args.sparse)
    for name in grid:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: given beside --compare; allowed: one of the two")
    two = settings.pair(args.compare, args.sparse)
    # Dense attention stands beside both in the tables, where it can run.
    dense = [] if Setting() in two or args.sparse.get("offload") is not None else [Setting()]
    return [*dense, *two]


def _settle(args: argparse.Namespace, found: list[Setting], model: Any) -> None:
    """Fill in what depends on model and machine."""
    from vllm.platforms import current_platform

    on_cpu, most = current_platform.is_cpu(), model.max_model_len
    args.lengths = args.lengths or [length for length in LENGTHS if length <= most] or [most]
    least = max(LEAST_LENGTH, args.score_tokens + 2)
    for length in args.lengths:
        if not least <= length <= most:
            raise ConfigError(f"--lengths: {length}; allowed for this model and --score-tokens: {least} to {most}")
    # What the backend takes where none is asked for.
    args.block_size = args.block_size or (32 if on_cpu else 16)
    for setting in found:
        config = SparseConfig.from_mapping(setting.mapping(args.sparse), "--sparse")
        config.check_page_size(args.block_size)
    args.chunk = args.chunk or (CPU_CHUNK if on_cpu else GPU_CHUNK)
    args.batch = args.batch or (1 if on_cpu else GPU_BATCH)
    if args.chunk < args.batch:
        raise ConfigError(f"--chunk: {args.chunk}; allowed with --batch {args.batch}: {args.batch} or more")
    args.dtype = str(model.dtype).removeprefix("torch.")
    args.kv_dtype = commands.kv_dtype(args.kv_cache_dtype, model)

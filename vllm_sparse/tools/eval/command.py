"""`vllm-sparse eval MODEL`: arguments, and the loop over tasks, samples and settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies.registry import DECODE_POLICIES, PREFILL_POLICIES
from vllm_sparse.tools import commands
from vllm_sparse.tools.eval import samples, summary
from vllm_sparse.tools.eval.engine import EvalEngine, Found, agreement, divergence, loss
from vllm_sparse.tools.eval.rows import Rows, environment
from vllm_sparse.tools.eval.ruler import score
from vllm_sparse.tools.eval.samples import TASKS, TEXT, Sample, Samples
from vllm_sparse.tools.eval.settings import Setting, by_summary, grid

LENGTHS = (4096, 8192, 16384, 32768)
LEAST_LENGTH = 256
CPU_CHUNK, GPU_CHUNK, GPU_BATCH = 2048, 8192, 8
MOST_SAMPLES, MOST_CHUNK, MOST_BATCH = 10_000, 1 << 20, 1024


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure what budgets and policies cost in quality",
        description="Measure what budgets and policies cost a model in quality, through the real engine: loss and "
        "divergence from dense of the last tokens of long texts, RULER's tasks, and the attention mass of the "
        "chosen pages. Leaves JSON lines and an HTML page. An interrupted run continues when it is repeated.",
    )
    parser.set_defaults(run=run)
    commands.add_model_options(parser)
    decode = [name for name in DECODE_POLICIES if name != "dense"]

    names, whole, real, several = commands.several(str), commands.whole, commands.real, commands.several

    def option(name: str, about: str, kind: Callable, **more) -> None:
        parser.add_argument(name, type=kind, help=about, **more)

    option("--policies", f"of decode, with commas; default: {','.join(decode)}", names, default=decode)
    option("--budgets", "tokens; default: 256,512,1024,2048", several(whole(1)), default=[256, 512, 1024, 2048])
    option(
        "--prefill-policies",
        f"of prefill, alone and with each of decode; default: dense; known: {','.join(PREFILL_POLICIES)}",
        names,
        default=["dense"],
    )
    option("--top-p", "of prefill policies that estimate; default: 0.98", several(real()), default=[0.98])
    tasks = [TEXT, "niah_single"]
    option("--tasks", f"default: {','.join(tasks)}; known: {','.join(TASKS)}", names, default=tasks)
    option(
        "--lengths", "tokens of prompt and answer; default: 4096 to 32768, as the model takes", several(whole(1))
    )
    option("--passages", f"samples of {TEXT} per length; default: 2", whole(1, MOST_SAMPLES), default=2)
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
    option("--sparse", "further sparse settings of all runs, as JSON", commands.json_object, default={})
    option("--out", "results; the page is beside them; default: eval.jsonl", Path, default=Path("eval.jsonl"))
    option("--chunk", "tokens of a step of prefill; default: 8192, on a CPU 2048", whole(1, MOST_CHUNK))
    option("--batch", "samples at a time; default: 8, on a CPU 1", whole(1, MOST_BATCH))
    share = real(0, 1, above=True)
    option("--gpu-memory-utilization", "as for `vllm serve`; default: 0.8", share, default=0.8)


def run(args: argparse.Namespace) -> None:
    """Measure what was not measured before, then write the page and print a table.

    Raises:
        ConfigError: an argument that cannot be used; names it, its value and what is allowed.
    """
    settings = _checked(args)
    report = _report()
    commands.check_writable(args.out)
    commands.check_writable(args.out.with_suffix(".html"))
    commands.stay_in_process()
    # Logits processors of one kind only; vLLM's second runner has another interface for them.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    model = commands.model_config(args)
    _settle(args, settings, model)
    text = commands.sample_text(args.text)
    rows = Rows(args.out)
    run = Run(args, settings, text, rows)
    run.check_samples(commands.tokenizer(args, model))
    run.all()
    found = summary.Summary([row for row in rows.rows if run.is_mine(row)])
    page = args.out.with_suffix(".html")
    report.write(page, found)
    print(f"\n{summary.table(found)}\n\nResults are in {args.out}, plots in {page}")


def _report():
    """The module that writes the page; asked for before minutes of measuring."""
    try:
        from vllm_sparse.tools.demo import packages  # noqa: F401  the progress bar
        from vllm_sparse.tools.eval import report
    except ImportError as error:
        raise ConfigError(
            f"{error}, which the page and the progress bar need: pip install 'vllm-sparse[eval]'"
        ) from None
    return report


def _checked(args: argparse.Namespace) -> list[Setting]:
    """The settings asked for; refuses what needs no model to be refused."""
    for task in args.tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks: {task!r}; allowed: {', '.join(TASKS)}")
    if args.out.suffix == ".html":
        raise ConfigError(f"--out: {args.out} is where the page would go; allowed: another ending, such as .jsonl")
    if TEXT in args.tasks and args.sparse.get("offload") is not None:
        raise ConfigError(
            f"--tasks: {TEXT} is compared with dense decode, which offload refuses; allowed with offload in "
            f"--sparse: {', '.join(task for task in TASKS if task != TEXT)}"
        )
    return grid(args.policies, args.budgets, args.prefill_policies, args.top_p, args.sparse)


def _settle(args: argparse.Namespace, settings: list[Setting], model: Any) -> None:
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
    for setting in settings:
        config = SparseConfig.from_mapping(setting.mapping(args.sparse), "--sparse")
        config.check_page_size(args.block_size)
    args.chunk = args.chunk or (CPU_CHUNK if on_cpu else GPU_CHUNK)
    args.batch = args.batch or (1 if on_cpu else GPU_BATCH)
    if args.chunk < args.batch:
        raise ConfigError(f"--chunk: {args.chunk}; allowed with --batch {args.batch}: {args.batch} or more")
    args.dtype = str(model.dtype).removeprefix("torch.")
    args.kv_dtype = commands.kv_dtype(args.kv_cache_dtype, model)


class Run:
    def __init__(self, args: argparse.Namespace, settings: list[Setting], text: str, rows: Rows):
        import torch

        self.args, self.settings, self.text, self.rows = args, settings, text, rows
        # Asked for once: whoever commits during the run changes nothing of what runs.
        self.environment = environment()
        path = Path(args.model)
        self.common = {
            "model": path.resolve().name if path.exists() else args.model,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "dtype": args.dtype, "kv_dtype": args.kv_dtype, "tp": args.tensor_parallel_size,
            "page_size": args.block_size, "chunk": args.chunk, "text": samples.digest(text),
            "score_tokens": args.score_tokens, "sparse": args.sparse, "split": args.split,
        }  # fmt: skip

    def is_mine(self, row: dict) -> bool:
        """Whether a row is of this model, text and kind of run; setting and sample may be any."""
        return all(row.get(name) == value for name, value in self.common.items())

    def all(self) -> None:
        from vllm_sparse.tools.demo.packages import progress

        groups = by_summary(self.settings)
        # Dense rows are every group's, and measured by the first that runs.
        total = len(set(self._missing(self.settings)))
        samples_per_length = sum(len(self._seeds(task)) for task in self.args.tasks)
        done = len(self.settings) * len(self.args.lengths) * samples_per_length - total
        if done and total:
            print(f"{self.args.out} holds {done} of {done + total} results: continuing there", flush=True)
        with progress("evaluating", done + total, initial=done, unit="result") as bar:
            for kind, settings in groups.items():
                if any(self._missing(settings)):
                    self._group(kind, settings, bar.update)

    def check_samples(self, tokenizer: Any) -> None:
        """Refuse what cannot be made of the text before weights are loaded and anything is measured."""
        samples = self._samples(tokenizer)
        for task, length in dict.fromkeys((task, length) for task, length, *_ in self._missing(self.settings)):
            samples.make(task, length, 0)

    def _samples(self, tokenizer: Any) -> Samples:
        args = self.args
        return Samples(tokenizer, self.text, args.split, args.passages, args.score_tokens)

    def _seeds(self, task: str) -> range:
        return range(self.args.passages if task == TEXT else self.args.needles)

    def _key(self, task: str, length: int, seed: int, setting: Setting) -> dict:
        return {**self.common, "task": task, "length": length, "seed": seed, **vars(setting)}

    def _missing(self, settings: list[Setting]) -> Iterator[tuple[str, int, int, Setting]]:
        for task in self.args.tasks:
            for length in self.args.lengths:
                for seed in self._seeds(task):
                    for setting in settings:
                        if not self.rows.has(self._key(task, length, seed, setting)):
                            yield task, length, seed, setting

    def _group(self, kind: str, settings: list[Setting], advance: Callable[[int], Any]) -> None:
        args = self.args
        with ExitStack() as stack:
            engine = stack.enter_context(EvalEngine.start(args, settings, kind, args.sparse))
            make = self._samples(engine.tokenizer).make
            for task in args.tasks:
                for length in args.lengths:
                    seeds = [
                        seed for seed in self._seeds(task)
                        if any(not self.rows.has(self._key(task, length, seed, s)) for s in settings)
                    ]  # fmt: skip
                    for first in range(0, len(seeds), args.batch):
                        batch = [make(task, length, seed) for seed in seeds[first : first + args.batch]]
                        for sample in batch:
                            self._check_rows(sample, settings)
                        self._batch(engine, settings, batch, advance)

    def _check_rows(self, sample: Sample, settings: list[Setting]) -> None:
        """Refuse to measure ``sample`` beside rows of another one of its number."""
        made = {"depth": sample.depth, "prompt_tokens": len(sample.tokens)}
        for setting in settings:
            row = self.rows.get(self._key(sample.task, sample.length, sample.seed, setting)) or {}
            if any(row.get(name, value) != value for name, value in made.items()):
                raise ConfigError(
                    f"--out: {self.args.out} holds results of other samples of {sample.task} at {sample.length} "
                    f"tokens, which another version or tokenizer made; allowed: a new file"
                )

    def _batch(self, engine: EvalEngine, settings: list[Setting], batch: list[Sample], advance) -> None:
        """All settings on samples of one task and length, dense first, which the others are compared with."""
        dense: Found | None = None
        for setting in settings:
            keys = [self._key(sample.task, sample.length, sample.seed, setting) for sample in batch]
            new = [not self.rows.has(key) for key in keys]
            if not any(new) and not (setting.is_dense and batch[0].task == TEXT):
                continue
            found = engine.run(setting, batch, self.args.recall_every)
            dense = dense or found
            rows = [
                {**self.environment, **key, **self._measured(sample, index, found, dense)}
                for index, (sample, key) in enumerate(zip(batch, keys, strict=True))
                if new[index]
            ]
            self.rows.add(rows)
            advance(len(rows))

    def _measured(self, sample: Sample, index: int, found: Found, dense: Found) -> dict:
        answer, shared = found.answers[index], {
            "attended": _rounded(found.attended), "prefill_density": _rounded(found.prefill_density),
        }  # fmt: skip
        if sample.task != TEXT:
            return {
                **shared, "depth": sample.depth, "score": round(score(answer.text, sample.answers), 4),
                "answer": answer.text, "expected": list(sample.answers), "prompt_tokens": len(sample.tokens),
            }  # fmt: skip
        steps, reference = answer.steps, dense.answers[index].steps
        return {
            **shared, "loss": round(loss(steps, sample.forced[1:]), 5),
            "dense_loss": round(loss(reference, sample.forced[1:]), 5),
            "kl": round(divergence(reference, steps), 5), "same_top": round(agreement(reference, steps), 4),
            "recall": _rounded(found.recall), "mass": _rounded(found.mass), "layers": found.layers,
        }  # fmt: skip


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if values is None else round(values, 4)

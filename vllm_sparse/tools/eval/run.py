"""Run: the loop over engines, tasks, samples and settings, which measures what no row has yet."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.eval.engine import Answer, EvalEngine, Found, agreement, divergence, loss
from vllm_sparse.tools.eval.estimate import Work
from vllm_sparse.tools.eval.problems import digest
from vllm_sparse.tools.eval.rows import CACHE, Rows, cache_of, environment
from vllm_sparse.tools.eval.samples import Sample, Samples
from vllm_sparse.tools.eval.settings import Group, Setting, by_engine
from vllm_sparse.tools.eval.tasks import LOSSES, PREFILL_TEXT, PROBLEMS

FIRST_TOKENS, RUN_TOKENS = 1024, 64
"""Tokens of a text that are prefilled and not scored, and those of a run whose mean loss a row has."""


class Run:
    def __init__(self, args: argparse.Namespace, settings: list[Setting], text: str, rows: Rows):
        import torch

        self.args, self.text, self.rows = args, text, rows
        # Dense first, which the others are compared with.
        self.settings = sorted(settings, key=lambda setting: not setting.is_dense)
        # Asked for once: whoever commits during the run changes nothing of what runs.
        self.environment = environment()
        path = Path(args.model)
        self.common = {
            "model": path.resolve().name if path.exists() else args.model,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "dtype": args.dtype, "kv_dtype": args.kv_dtype,
            "kv_skip_layers": args.kv_cache_dtype_skip_layers, "tp": args.tensor_parallel_size,
            "page_size": args.block_size, "chunk": args.chunk,
            "score_tokens": args.score_tokens, "sparse": args.sparse, "split": args.split,
        }  # fmt: skip
        self.first: dict[tuple[str, int], Sample] = {}
        """By task and length, the first sample of those that are missing."""
        self.digests = {"text": digest(text)} | {name: one.digest for name, one in args.questions.items()}

    def by_cache(self) -> dict[str, list[dict]]:
        """Rows of this model, text and kind of run by what the KV cache holds, this run's last; setting and sample
        may be any."""
        found: dict[str, list[dict]] = {}
        for row in self.rows.rows:
            if self._is_mine(row):
                found.setdefault(cache_of(row), []).append(row)
        name = cache_of(self.common)
        mine = found.pop(name, [])
        return {**found, name: mine}

    def _is_mine(self, row: dict) -> bool:
        task = row["task"]
        needs = PROBLEMS[task].needs if task in PROBLEMS else "text"
        return row.get("text") == self.digests.get(needs) and all(
            row.get(name) == value for name, value in self.common.items() if name not in CACHE
        )

    def all(self) -> None:
        from vllm_sparse.tools.demo.packages import progress

        # Dense rows are every group's, and measured by the first that runs.
        total = len(set(self._missing(self.settings)))
        samples_per_length = sum(len(self._seeds(task)) for task in self.args.tasks)
        done = len(self.settings) * len(self.args.lengths) * samples_per_length - total
        if done and total:
            print(f"{self.args.out} holds {done} of {done + total} results: continuing there", flush=True)
        work = self._work()
        if total:
            print(f"{total} results: {work.describe()}", flush=True)
        with progress("evaluating", done + total, initial=done, unit="result") as bar:
            for group in by_engine(self.settings, self.args.sparse):
                if any(self._missing(group.settings)):
                    self._group(group, work, bar)
                    work = None

    def check_samples(self, tokenizer: Any) -> None:
        """Refuse what cannot be made before weights are loaded and anything is measured."""
        samples = self._samples(tokenizer)
        for task, length in dict.fromkeys((task, length) for task, length, *_ in self._missing(self.settings)):
            self.first[task, length] = samples.make(task, length, 0)

    def _work(self) -> Work:
        """All that is missing, as if each sample were like the first of its task and length."""
        work, seen = Work(), set()
        for group in by_engine(self.settings, self.args.sparse):
            missing = [one for one in self._missing(group.settings) if one not in seen]
            seen.update(missing)
            for place, sample in self.first.items():
                own = [one for one in missing if one[:2] == place]
                if own:
                    *_, seeds, settings = map(set, zip(*own, strict=True))
                    work.add(sample, len(seeds), settings, self.args.batch)
        return work

    def _samples(self, tokenizer: Any) -> Samples:
        args = self.args
        return Samples(tokenizer, self.text, args.split, args.passages, args.score_tokens, args.questions)

    def _seeds(self, task: str) -> range:
        return range(self.args.passages if task in LOSSES else self.args.needles)

    def _key(self, task: str, length: int, seed: int, setting: Setting) -> dict:
        text = self.digests["text" if task in LOSSES else PROBLEMS[task].needs]
        sample = {"text": text, "task": task, "length": length, "seed": seed}
        return {**self.common, **sample, **setting.columns()}

    def _missing(self, settings: Iterable[Setting]) -> Iterator[tuple[str, int, int, Setting]]:
        for task in self.args.tasks:
            for length in self.args.lengths:
                for seed in self._seeds(task):
                    for setting in settings:
                        if not self.rows.has(self._key(task, length, seed, setting)):
                            yield task, length, seed, setting

    def _group(self, group: Group, work: Work | None, bar: Any) -> None:
        """All that is missing of a group's settings; of ``work``, where it is given, the time is told first."""
        args = self.args
        with ExitStack() as stack:
            engine = stack.enter_context(EvalEngine.start(args, group, args.sparse))
            if work is not None:
                longest = max(self.first.values(), key=lambda sample: len(sample.tokens))
                speed = engine.speed(longest, args.batch)
                bar.write(f"about {speed.describe(work)}")
            make = self._samples(engine.tokenizer).make
            for task in args.tasks:
                for length in args.lengths:
                    seeds = [
                        seed for seed in self._seeds(task)
                        if any(not self.rows.has(self._key(task, length, seed, s)) for s in group.settings)
                    ]  # fmt: skip
                    for first in range(0, len(seeds), args.batch):
                        batch = [make(task, length, seed) for seed in seeds[first : first + args.batch]]
                        for sample in batch:
                            self._check_rows(sample, group.settings)
                        self._batch(engine, group.settings, batch, bar.update)

    def _check_rows(self, sample: Sample, settings: Iterable[Setting]) -> None:
        """Refuse to measure ``sample`` beside rows of another one of its number."""
        made = {"depth": sample.depth, "prompt_tokens": len(sample.tokens)}
        for setting in settings:
            row = self.rows.get(self._key(sample.task, sample.length, sample.seed, setting)) or {}
            if any(row.get(name, value) != value for name, value in made.items()):
                raise ConfigError(
                    f"--out: {self.args.out} holds results of other samples of {sample.task} at {sample.length} "
                    f"tokens, which another version or tokenizer made; allowed: a new file"
                )

    def _batch(self, engine: EvalEngine, settings: Iterable[Setting], batch: list[Sample], advance) -> None:
        """All settings on samples of one task and length, dense first, which the others are compared with."""
        dense: Found | None = None
        for setting in settings:
            keys = [self._key(sample.task, sample.length, sample.seed, setting) for sample in batch]
            new = [not self.rows.has(key) for key in keys]
            if not any(new) and not (setting.is_dense and batch[0].task in LOSSES):
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
        if sample.task == PREFILL_TEXT:
            both = [_prefilled(one.answers[index].losses) for one in (found, dense)]
            return {**shared, **both[0], "dense_loss": both[1]["loss"]}
        if sample.task not in LOSSES:
            return {**shared, **_scored(sample, answer)}
        steps, reference = answer.steps, dense.answers[index].steps
        return {
            **shared, "loss": round(loss(steps, sample.forced[1:]), 5),
            "dense_loss": round(loss(reference, sample.forced[1:]), 5),
            "kl": round(divergence(reference, steps), 5), "same_top": round(agreement(reference, steps), 4),
            "recall": _rounded(found.recall), "mass": _rounded(found.mass), "layers": found.layers,
        }  # fmt: skip


def _scored(sample: Sample, answer: Answer) -> dict:
    """What a row says of an answer that is scored; of several turns the score is their mean."""
    score = PROBLEMS[sample.task].score
    turns = [sample.answers, *(turn.answers for turn in sample.turns)]
    scores = [score(text, expected) for text, expected in zip(answer.texts, turns, strict=True)]
    found = {
        "depth": sample.depth, "score": round(sum(scores) / len(scores), 4), "answer": "\n".join(answer.texts),
        "expected": [one for expected in turns for one in expected], "prompt_tokens": len(sample.tokens),
        "generated": answer.generated,
    }  # fmt: skip
    return found | ({"turns": _rounded(scores), "reused": answer.reused} if sample.turns else {})


def _prefilled(losses: list[float]) -> dict:
    """What a row says of a text that was prefilled: its mean loss, and the means over runs of tokens.

    The first tokens, whose context is short, are left out."""
    first = min(FIRST_TOKENS, len(losses) // 2)
    losses = losses[first:]
    runs = [losses[i : i + RUN_TOKENS] for i in range(0, len(losses), RUN_TOKENS)]
    return {
        "loss": round(sum(losses) / len(losses), 5), "scored": len(losses),
        "run_losses": [round(sum(run) / len(run), 4) for run in runs],
    }  # fmt: skip


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if values is None else round(values, 4)

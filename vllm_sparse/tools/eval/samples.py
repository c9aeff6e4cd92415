"""Samples: prompts of a task and length. ``dev`` and ``report`` share no text and no random number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools import commands
from vllm_sparse.tools.eval import ruler

TEXT = "text"
"""The task that scores a text's own last tokens."""
TASKS = (TEXT, *ruler.TASKS)
SPLITS = ("dev", "report")
SPARE_ANSWER_TOKENS = 8


def spread(seed: int) -> float:
    """The first places of 0, 1, 1/2, 1/4, 3/4, 1/8, ...: any number of them is evenly spread, and more move none
    (van der Corput, 1935)."""
    if seed < 2:
        return float(seed)
    level = (seed - 1).bit_length()
    return (2 * (seed - 2 ** (level - 1)) - 1) / 2**level


@dataclass(frozen=True)
class Sample:
    task: str
    length: int
    """Most tokens of prompt and answer together."""
    seed: int
    tokens: list[int] = field(repr=False)
    """The prompt."""
    max_tokens: int
    forced: list[int] | None = field(default=None, repr=False)
    """Tokens that the answer is made to be, in :data:`TEXT`; the first comes of prefill and is not scored."""
    answers: tuple[str, ...] = ()
    depth: float | None = None
    """Depth of the needle: 0 at the beginning, 1 at the end; None where there is none."""


class Samples:
    """Makes the samples of one half of a text."""

    def __init__(self, tokenizer: Any, text: str, split: str, passages: int, score_tokens: int):
        self.tokenizer, self.split = tokenizer, split
        self.text = commands.half_of(text, split)
        self.passages, self.score_tokens = passages, score_tokens

    def make(self, task: str, length: int, seed: int) -> Sample:
        return self._passage(length, seed) if task == TEXT else self._problem(task, length, seed)

    @cached_property
    def _start(self) -> list[int]:
        """Tokens that the tokenizer begins a text with."""
        return self.tokenizer.encode("")

    @cached_property
    def _body(self) -> list[int]:
        return self.tokenizer.encode(self.text, add_special_tokens=False)

    @cached_property
    def _source(self) -> ruler.Source:
        return ruler.Source.of(self.text)

    def _passage(self, length: int, seed: int) -> Sample:
        body = length - len(self._start)
        spare = len(self._body) - body
        if spare < 2 * (self.passages - 1):
            raise ConfigError(
                f"--text: {len(self._body)} tokens of the half for --split {self.split} are too few for "
                f"{self.passages} passages of {length}; allowed: a longer text, smaller --lengths or --passages"
            )
        first = int(spare * spread(seed))
        tokens = self._start + self._body[first : first + body]
        split = length - self.score_tokens - 1
        return Sample(TEXT, length, seed, tokens[:split], self.score_tokens + 1, tokens[split:])

    def _problem(self, task: str, length: int, seed: int) -> Sample:
        depth = spread(seed) if task == "niah_single" else None
        name = f"{self.split} {task} {length} {seed}"

        def count(problem: ruler.Problem) -> int:
            return len(self._prompt(problem)) + self._answer_tokens(problem)

        problem = ruler.fitted(task, self._source, length, name, depth, count)
        return Sample(
            task, length, seed, self._prompt(problem), self._answer_tokens(problem),
            answers=problem.answers, depth=depth,
        )  # fmt: skip

    def _prompt(self, problem: ruler.Problem) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            messages = [
                {"role": "user", "content": problem.text},
                {"role": "assistant", "content": problem.answer_start},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(f"{problem.text}\n{problem.answer_start}")

    def _answer_tokens(self, problem: ruler.Problem) -> int:
        """Room for the right answer twice, as models number and repeat things."""
        tokens = len(self.tokenizer.encode(" " + ", ".join(problem.answers), add_special_tokens=False))
        return 2 * tokens + SPARE_ANSWER_TOKENS


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

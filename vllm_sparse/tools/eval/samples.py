"""Samples: prompts of a task and length. ``dev`` and ``report`` share no text and no random number."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools import commands
from vllm_sparse.tools.eval.problems import Problem, Source, fitted
from vllm_sparse.tools.eval.qa import Questions
from vllm_sparse.tools.eval.tasks import LOSSES, OLD_NAMES, PREFILL_TEXT, PROBLEMS, TEXT

SPLITS = ("dev", "report")
SPARE_ANSWER_TOKENS = 8
MARK = "<<the answer>>"
"""Stands for a model's own answer while a template is asked what follows it."""


def spread(seed: int) -> float:
    """The first places of 0, 1, 1/2, 1/4, 3/4, 1/8, ...: any number of them is evenly spread, and more move none
    (van der Corput, 1935)."""
    if seed < 2:
        return float(seed)
    level = (seed - 1).bit_length()
    return (2 * (seed - 2 ** (level - 1)) - 1) / 2**level


@dataclass(frozen=True)
class Turn:
    """A question after the model's own answer to the one before."""

    tokens: list[int] = field(repr=False)
    """All that follows that answer: its end, the question, and the first words of the next answer."""
    max_tokens: int
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    task: str
    length: int
    """Most tokens of prompt and answer together, those of all turns."""
    seed: int
    tokens: list[int] = field(repr=False)
    """The prompt."""
    max_tokens: int
    forced: list[int] | None = field(default=None, repr=False)
    """Tokens that the answer is made to be, in :data:`TEXT`; the first comes of prefill and is not scored."""
    answers: tuple[str, ...] = ()
    depth: float | None = None
    """Depth of the needle: 0 at the beginning, 1 at the end; None where there is none."""
    turns: tuple[Turn, ...] = ()
    """Later turns, in order."""
    end: tuple[int, ...] = ()
    """The token with which a template ends an answer, where what a model says after it would count."""

    @property
    def answer_tokens(self) -> int:
        """Most tokens that are generated."""
        return self.max_tokens + sum(turn.max_tokens for turn in self.turns)


class Samples:
    """Makes the samples of one half of a text, and of one half of the files of other tasks."""

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        split: str,
        passages: int,
        score_tokens: int,
        questions: dict[str, Questions] | None = None,
    ):
        """``questions``: of this half, by the option that names their file."""
        self.tokenizer, self.split = tokenizer, split
        self.text = commands.half_of(text, split)
        self.passages, self.score_tokens = passages, score_tokens
        self.questions = questions or {}

    def make(self, task: str, length: int, seed: int) -> Sample:
        return self._passage(task, length, seed) if task in LOSSES else self._problem(task, length, seed)

    @cached_property
    def _start(self) -> list[int]:
        """Tokens that the tokenizer begins a text with."""
        return self.tokenizer.encode("")

    @cached_property
    def _body(self) -> list[int]:
        return self.tokenizer.encode(self.text, add_special_tokens=False)

    @cached_property
    def _source(self) -> Source:
        return Source.of(self.text)

    def _passage(self, task: str, length: int, seed: int) -> Sample:
        body = length - len(self._start)
        spare = len(self._body) - body
        if spare < 2 * (self.passages - 1):
            raise ConfigError(
                f"--text: {len(self._body)} tokens of the half for --split {self.split} are too few for "
                f"{self.passages} passages of {length}; allowed: a longer text, smaller --lengths or --passages"
            )
        first = int(spare * spread(seed))
        tokens = self._start + self._body[first : first + body]
        if task == PREFILL_TEXT:
            # A request must say something, which needs room.
            return Sample(task, length, seed, tokens[:-1], 1)
        split = length - self.score_tokens - 1
        return Sample(TEXT, length, seed, tokens[:split], self.score_tokens + 1, tokens[split:])

    def _problem(self, name: str, length: int, seed: int) -> Sample:
        task = PROBLEMS[name]
        # Renamed tasks draw what they drew before.
        numbers = f"{self.split} {OLD_NAMES.get(name, name)} {length} {seed}"

        def room(problem: Problem) -> int:
            """Room for the right answer a few times, as models number and repeat things."""
            tokens = self._encode(" " + ", ".join(problem.answers))
            return int(task.room * len(tokens)) + SPARE_ANSWER_TOKENS

        def count(problem: Problem) -> int:
            follow_ups = sum(len(self._follow_up(turn)) + room(turn) for turn in problem.follow_ups)
            return len(self._prompt(problem)) + room(problem) + follow_ups

        source = self._source if task.needs == "text" else self.questions[task.needs]
        problem = fitted(name, task, source, length, numbers, spread(seed), count)
        return Sample(
            name, length, seed, self._prompt(problem), room(problem), answers=problem.answers, depth=problem.depth,
            turns=tuple(Turn(self._follow_up(turn), room(turn), turn.answers) for turn in problem.follow_ups),
            end=self._end if problem.follow_ups or not problem.answer_start else (),
        )  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text that others stand before."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _prompt(self, problem: Problem) -> list[int]:
        if self._has_template:
            return self._encode(self._chat(problem))
        if problem.history:
            turns = "".join(f"User: {asked}\nAssistant:\n{said}\n" for asked, said in problem.history)
            return self.tokenizer.encode(f"{turns}User: {problem.text}\nAssistant:\n{problem.answer_start}")
        return self.tokenizer.encode(f"{problem.text}\n{problem.answer_start}")

    def _follow_up(self, problem: Problem) -> list[int]:
        """What follows the model's own answer to the question before, up to where it goes on."""
        if not self._has_template:
            return self._encode(f"\n{problem.text}\n{problem.answer_start}")
        _, mark, after = self._chat(problem, (("-", MARK),)).partition(MARK)
        if not mark:
            raise ConfigError(
                "MODEL: its chat template does not show what an assistant said before; allowed: other --tasks"
            )
        return self._encode(after)

    @cached_property
    def _end(self) -> tuple[int, ...]:
        """The first token after an answer, if no text has it: of some models it is not the end of a sequence."""
        if not self._has_template:
            return ()
        first = self._follow_up(Problem("-", "-", ()))[0]
        return (first,) if first in self.tokenizer.all_special_ids else ()

    def _chat(self, problem: Problem, before: tuple[tuple[str, str], ...] = ()) -> str:
        messages = []
        for asked, said in (*before, *problem.history):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": problem.text})
        if not problem.answer_start:
            # Of models that can think aloud before an answer, the answer is asked for.
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        messages.append({"role": "assistant", "content": problem.answer_start})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)

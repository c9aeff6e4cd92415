"""Problems: what a task asks and how an answer is checked, before any tokenizer; and the longest one that fits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_sparse.errors import ConfigError

SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"')\]]*\s+")
WORD = re.compile(r"\b[a-z]{4,10}\b")
LEAST_WORDS = 100
MOST_SIZE = 1 << 22


@dataclass(frozen=True)
class Source:
    """Sentences and words that prompts are made of."""

    sentences: tuple[str, ...]
    words: tuple[str, ...]
    """Different words of the text, in alphabetical order."""

    @classmethod
    def of(cls, text: str) -> Source:
        sentences = tuple(" ".join(sentence.split()) for sentence in SENTENCE.findall(text))
        return cls(sentences, tuple(sorted(set(WORD.findall(text)))))

    def check(self) -> None:
        """Raise :class:`ConfigError` where the text is too poor for any task."""
        if not self.sentences or len(self.words) < LEAST_WORDS:
            raise ConfigError(
                f"--text: too few sentences or words for tasks; allowed: running text, {LEAST_WORDS} words"
            )

    def haystack(self, size: int, needles: list[tuple[float, str]], rng: Random) -> str:
        """``size`` sentences from a random one on, and each needle at its depth among them."""
        start = rng.randrange(len(self.sentences))
        return hide([self.sentences[(start + i) % len(self.sentences)] for i in range(size)], needles, " ")


@dataclass(frozen=True)
class Problem:
    text: str
    """The user's message; with ``follow_ups``, the first one."""
    answer_start: str
    """The first words of the answer, which the model continues; empty where it begins itself."""
    answers: tuple[str, ...]
    """What the task's score looks for in the answer."""
    history: tuple[tuple[str, str], ...] = ()
    """Turns before: messages of the user and the replies to them."""
    follow_ups: tuple[Problem, ...] = ()
    """Questions of later turns, each asked after the model's own answer to the one before."""
    depth: float | None = None
    """Depth of the needle: 0 at the beginning, 1 at the end; None where there is none, or several."""


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    make: Callable[[Any, int, Random, float], Problem]
    """(source, amount of haystack, random numbers, place) -> problem. Places of a length's samples are spread
    evenly over 0 to 1."""
    score: Callable[[str, tuple[str, ...]], float]
    """(output, answers) -> 0 to 1."""
    about: str
    """What it asks, in a few words."""
    least: int = 4
    """Least amount of haystack."""
    most: Callable[[Any], int] = lambda source: MOST_SIZE
    """Amount of haystack beyond which a source has no more."""
    room: float = 2.0
    """Room for an answer, in lengths of the right one."""
    needs: str = "text"
    """The option that names the source."""


def digest(text: str) -> str:
    """What tells a source from others, in rows."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hide(lines: list[str], needles: list[tuple[float, str]], between: str) -> str:
    """``lines`` with each needle at its depth among them."""
    size, lines = len(lines), list(lines)
    for depth, needle in sorted(needles, reverse=True):
        lines.insert(round(depth * size), needle)
    return between.join(lines)


def all_of(output: str, answers: tuple[str, ...]) -> float:
    """RULER's ``string_match_all``: the share of ``answers`` that ``output`` holds, in any case."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def any_of(output: str, answers: tuple[str, ...]) -> float:
    """RULER's ``string_match_part``: 1 where ``output`` holds one of ``answers``, in any case."""
    return float(any(answer.lower() in output.lower() for answer in answers))


def fitted(
    name: str, task: Task, source: Any, limit: int, seed: str, place: float, count: Callable[[Problem], int]
) -> Problem:
    """The longest problem of ``task``, called ``name``, that ``count`` finds no longer than ``limit`` tokens.

    Raises:
        ConfigError: the source is too poor, or no problem is so short.
    """
    source.check()

    def make(size: int) -> Problem:
        return task.make(source, size, Random(seed), place)

    least, largest = task.least, task.most(source)
    if count(make(least)) > limit:
        raise ConfigError(
            f"--lengths: {limit} tokens are too few for a prompt of {name}; allowed: from about "
            f"{count(make(least))} on"
        )
    most = 2 * least
    while most < MOST_SIZE and count(make(most)) <= limit:
        if most >= largest:
            raise ConfigError(f"--{task.needs}: too little for {name} at {limit} tokens; allowed: more of it")
        least, most = most, 2 * most
    while most - least > max(1, least // 200):
        middle = (least + most) // 2
        least, most = (middle, most) if count(make(middle)) <= limit else (least, middle)
    return make(least)

"""RULER's synthetic tasks, made offline from any text, and their score.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024,
arXiv 2404.06654: tasks, prompts and sizes follow the paper and its code; needles' keys and the words to
count are drawn from the given text, where RULER has word lists.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from vllm_sparse.errors import ConfigError

SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"')\]]*\s+")
WORD = re.compile(r"\b[a-z]{4,10}\b")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES, CHAIN_HOPS = 4, 4
COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
FREQUENT_WORDS, ZIPF_EXPONENT = 3, 2.0
LEAST_SIZE = {"fwe": 300}
"""Least words of a haystack of ``fwe``: fewer would not have three that are most frequent. Elsewhere 4."""


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


@dataclass(frozen=True)
class Problem:
    text: str
    """The user's message."""
    answer_start: str
    """The first words of the answer, which the model continues."""
    answers: tuple[str, ...]
    """Strings that are all to be found in the answer."""


def score(output: str, answers: tuple[str, ...]) -> float:
    """RULER's ``string_match_all``: the share of ``answers`` that ``output`` holds, in any case."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def _haystack(source: Source, size: int, needles: list[tuple[float, str]], rng: Random) -> str:
    """``size`` sentences from a random one on, and each needle at its depth among them."""
    start = rng.randrange(len(source.sentences))
    lines = [source.sentences[(start + i) % len(source.sentences)] for i in range(size)]
    for depth, needle in sorted(needles, reverse=True):
        lines.insert(round(depth * size), needle)
    return " ".join(lines)


def _niah(keys: int, values: int, queries: int) -> Callable:
    def make(source: Source, size: int, rng: Random, depth: float | None) -> Problem:
        names = ["-".join(rng.sample(source.words, 2)) for _ in range(keys)]
        numbers = [[str(rng.randrange(1_000_000, 10_000_000)) for _ in range(values)] for _ in names]
        texts = [
            f"One of the special magic numbers for {name} is: {number}."
            for name, row in zip(names, numbers, strict=True)
            for number in row
        ]
        depths = [rng.random() for _ in texts]
        if depth is not None:
            depths[0] = depth
        asked = names[:queries]
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if queries > 1 else asked[0]
        answers = tuple(number for row in numbers[:queries] for number in row)
        what, verb = ("numbers", "are") if len(answers) > 1 else ("number", "is")
        hidden = "Some special magic numbers are" if len(texts) > 1 else "A special magic number is"
        return Problem(
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"{what} afterwards.\n{_haystack(source, size, list(zip(depths, texts, strict=True)), rng)}\n"
            f"What {verb}{' all' if len(answers) > 1 else ''} the special magic {what} for {query} mentioned in "
            f"the provided text?",
            f"The special magic {what} for {query} mentioned in the provided text {verb}",
            answers,
        )

    return make


def _variable_tracking(source: Source, size: int, rng: Random, depth: float | None) -> Problem:
    def chain(noise: int) -> tuple[str, str, list[str]]:
        names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(CHAIN_HOPS + 1)]
        value = str(rng.randrange(10_000, 100_000))
        steps = [f"VAR {name} = {f'VAR {before}' if before else value}"
                 for name, before in zip(names, [None, *names], strict=False)]  # fmt: skip
        lines = [NOISE] * noise
        places = sorted(rng.randrange(noise + 1) for _ in steps)
        for place, step in reversed(list(zip(places, steps, strict=True))):
            lines.insert(place, step)
        return "\n".join(lines), value, names

    def ask(context: str, value: str) -> tuple[str, str]:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{CHAIN_HOPS + 1} variables are assigned the value {value}, they are:",
        )

    example, value, names = chain(5)
    shown = " ".join(ask(example, value)) + " " + " ".join(names)
    context, value, names = chain(size)
    text, start = ask(context, value)
    return Problem(f"{shown}\n\n{text}", start, tuple(names))


def _common_words(source: Source, size: int, rng: Random, depth: float | None) -> Problem:
    def ask(common: list[str], others: list[str], common_times: int, other_times: int) -> tuple[str, str]:
        words = common * common_times + others * other_times
        rng.shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
            f"ones that appear most often.\n{listed}\nQuestion: What are the {COMMON_WORDS} most common words in "
            "the above list?",
            f"Answer: The top {COMMON_WORDS} words that appear most often in the list are:",
        )

    drawn = rng.sample(source.words, min(len(source.words), 2 * COMMON_WORDS + 20 + size))
    shown, common, few, others = (
        drawn[:COMMON_WORDS], drawn[COMMON_WORDS : 2 * COMMON_WORDS],
        drawn[2 * COMMON_WORDS : 2 * COMMON_WORDS + 20], drawn[2 * COMMON_WORDS + 20 :],
    )  # fmt: skip
    example = " ".join(ask(shown, few, 3, 1))
    example += " " + " ".join(f"{number}. {word}" for number, word in enumerate(shown, 1))
    text, start = ask(common, others, COMMON_TIMES, OTHER_TIMES)
    return Problem(f"{example}\n\n{text}", start, tuple(common))


def _frequent_words(source: Source, size: int, rng: Random, depth: float | None) -> Problem:
    # The most frequent word is noise, as in RULER; counts follow Zipf's law.
    total = sum(rank**-ZIPF_EXPONENT for rank in range(1, 1001))
    counts = [round(size * rank**-ZIPF_EXPONENT / total) for rank in range(1, 1001)]
    coded = ["....", *("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(999))]
    words = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    return Problem(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        f"frequently appeared coded words. {' '.join(words)}\nQuestion: Do not provide any explanation. Please "
        "ignore the dots '....'. What are the three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(coded[1 : 1 + FREQUENT_WORDS]),
    )


TASKS: dict[str, Callable[[Source, int, Random, float | None], Problem]] = {
    "niah_single": _niah(1, 1, 1),
    "niah_multikey": _niah(NEEDLES, 1, 1),
    "niah_multivalue": _niah(1, NEEDLES, 1),
    "niah_multiquery": _niah(NEEDLES, 1, NEEDLES),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
"""Name -> (source, amount of haystack, random numbers, depth of the first needle or None) -> problem."""


def fitted(
    task: str, source: Source, limit: int, seed: str, depth: float | None, count: Callable[[Problem], int]
) -> Problem:
    """The longest problem of ``task`` that ``count`` finds no longer than ``limit`` tokens.

    Raises:
        ConfigError: the text is too poor, or no problem is so short.
    """
    if not source.sentences or len(source.words) < 100:
        raise ConfigError("--text: too few sentences or words for RULER's tasks; allowed: running text, 100 words")

    def make(size: int) -> Problem:
        return TASKS[task](source, size, Random(seed), depth)

    least = LEAST_SIZE.get(task, 4)
    if count(make(least)) > limit:
        raise ConfigError(
            f"--lengths: {limit} tokens are too few for a prompt of {task}; allowed: from about "
            f"{count(make(least))} on"
        )
    most = 2 * least
    while most < 1 << 22 and count(make(most)) <= limit:
        if task == "cwe" and most >= len(source.words):
            raise ConfigError(f"--text: too few different words for {task} at {limit} tokens; allowed: more text")
        least, most = most, 2 * most
    while most - least > max(1, least // 200):
        middle = (least + most) // 2
        least, most = (middle, most) if count(make(middle)) <= limit else (least, middle)
    return make(least)

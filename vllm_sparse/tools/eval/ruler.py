"""RULER's synthetic tasks, made offline from any text.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024,
arXiv 2404.06654: tasks, prompts and sizes follow the paper and its code; needles' keys and the words to
count are drawn from the given text, where RULER has word lists. Its two tasks of questions are in
:mod:`vllm_sparse.tools.eval.qa`.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable
from random import Random

from vllm_sparse.tools.eval.problems import Problem, Source, Task, all_of, hide

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES, CHAIN_HOPS = 4, 4
COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
FREQUENT_WORDS, ZIPF_EXPONENT = 3, 2.0
LEAST_CODED_WORDS = 300
"""Fewer words of ``fwe`` would not have three that are most frequent."""


def _key(source: Source, rng: Random) -> str:
    return "-".join(rng.sample(source.words, 2))


def _number(source: Source, rng: Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _uuid(source: Source, rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def needle(key: str, value: str, what: str = "number") -> str:
    return f"One of the special magic {what}s for {key} is: {value}."


def question(keys: list[str], values: int, what: str = "number") -> tuple[str, str]:
    """Question and first words of the answer for ``values`` values of ``keys``."""
    asked = ", ".join(keys[:-1]) + f", and {keys[-1]}" if len(keys) > 1 else keys[0]
    what, verb = (f"{what}s", "are") if values > 1 else (what, "is")
    return (
        f"What {verb}{' all' if values > 1 else ''} the special magic {what} for {asked} mentioned in the "
        f"provided text?",
        f"The special magic {what} for {asked} mentioned in the provided text {verb}",
    )


def hidden(what: str, many: bool, asked_many: bool) -> str:
    """The sentences before a haystack."""
    begin = f"Some special magic {what}s are" if many else f"A special magic {what} is"
    return (
        f"{begin} hidden within the following text. Make sure to memorize it. I will quiz you about the "
        f"{what}{'s' if asked_many else ''} afterwards."
    )


def _niah(
    keys: int, values: int, queries: int, among: str = "text", key: Callable = _key, value: Callable = _number
):
    """Needles among sentences of the ``text``, ``noise`` (one line, repeated) or other ``needles``."""
    what = "uuid" if value is _uuid else "number"

    def make(source: Source, size: int, rng: Random, place: float) -> Problem:
        names = [key(source, rng) for _ in range(keys)]
        rows = [[value(source, rng) for _ in range(values)] for _ in names]
        texts = [needle(name, one, what) for name, row in zip(names, rows, strict=True) for one in row]
        depths = [rng.random() for _ in texts]
        single = len(texts) == 1 and among != "needles"
        if single:
            depths[0] = place
        placed = list(zip(depths, texts, strict=True))
        if among == "text":
            context = source.haystack(size, placed, rng)
        elif among == "noise":
            context = hide([NOISE] * size, placed, "\n")
        else:
            others = (key(source, rng) for _ in range(size))
            lines = [needle(name, value(source, rng), what) for name in others if name not in names]
            context = hide(lines, placed, "\n")
        answers = tuple(one for row in rows[:queries] for one in row)
        asked, start = question(names[:queries], len(answers), what)
        begin = hidden(what, not single, len(answers) > 1)
        return Problem(f"{begin}\n{context}\n{asked}", start, answers, depth=place if single else None)

    return make


def _variable_tracking(source: Source, size: int, rng: Random, place: float) -> Problem:
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


def _common_words(source: Source, size: int, rng: Random, place: float) -> Problem:
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


def _frequent_words(source: Source, size: int, rng: Random, place: float) -> Problem:
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


def _task(about: str, make: Callable, **more) -> Task:
    return Task(make, all_of, about, **more)


TASKS = {
    "niah_single_1": _task("a number in one repeated line", _niah(1, 1, 1, "noise")),
    "niah_single_2": _task("a number in running text", _niah(1, 1, 1)),
    "niah_single_3": _task("a UUID in running text", _niah(1, 1, 1, value=_uuid)),
    "niah_multikey_1": _task("a number, beside those of three other keys", _niah(NEEDLES, 1, 1)),
    "niah_multikey_2": _task("a number among needles of other keys alone", _niah(1, 1, 1, "needles")),
    "niah_multikey_3": _task("a UUID of a UUID among such needles", _niah(1, 1, 1, "needles", _uuid, _uuid)),
    "niah_multivalue": _task("four numbers of one key", _niah(1, NEEDLES, 1)),
    "niah_multiquery": _task("numbers of four keys", _niah(NEEDLES, 1, NEEDLES)),
    "vt": _task("five names that a chain of assignments gives one value", _variable_tracking),
    "cwe": _task("the ten words that a list has most often", _common_words, most=lambda source: len(source.words)),
    "fwe": _task("the three most frequent words of a coded text", _frequent_words, least=LEAST_CODED_WORDS),
}

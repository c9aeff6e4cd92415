"""RULER's two tasks of questions about documents, read from a file of the user's.

Hsieh et al., arXiv 2404.06654 (2024), ``qa_1`` and ``qa_2``: the documents that answer a question among others
of the same file, in any order; scored by whether the output holds one of the answers. The files are those of

- SQuAD (Rajpurkar et al., arXiv 1606.05250, 2016, and 1806.03822, 2018): ``{"data": [{"paragraphs": [{"context",
  "qas": [{"question", "answers": [{"text"}]}]}]}]}``, questions without an answer left out;
- HotpotQA (Yang et al., arXiv 1809.09600, 2018): ``[{"question", "answer", "context": [[title, [sentences]]]}]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vllm_sparse.errors import ConfigError, TextError
from vllm_sparse.tools.eval.problems import Problem, Task, any_of, digest
from vllm_sparse.user_text import parse_json, shown

ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    """Those that it is about; in HotpotQA with some that mislead."""


@dataclass(frozen=True)
class Questions:
    """Questions of one half of a file, and all documents of that half."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    digest: str
    """Of the whole file."""

    @classmethod
    def of(cls, questions: list[Question], digest: str) -> Questions:
        documents = dict.fromkeys(document for question in questions for document in question.documents)
        return cls(tuple(questions), tuple(documents), digest)

    def check(self) -> None:
        """All that :func:`read` returns can be asked."""


def read(path: Path, option: str, split: str) -> Questions:
    """The questions of one half of a file; ``option`` is ``squad`` or ``hotpotqa`` and says how it is written.

    Raises:
        ConfigError: it cannot be read as such a file, or has no question in a half.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = list(READERS[option](parse_json(text)))
    except (OSError, ValueError, TextError, KeyError, TypeError, IndexError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--{option}: {shown(str(path))} cannot be read ({why}); allowed: JSON as of {NAMES[option]}"
        ) from None
    # No document is in both halves: those of one article, or question, stand together.
    middle = len(found) // 2
    while 0 < middle < len(found) and set(found[middle].documents) & set(found[middle - 1].documents):
        middle += 1
    half = found[:middle] if split == "dev" else found[middle:]
    if not half:
        raise ConfigError(
            f"--{option}: {shown(str(path))} has {len(found)} questions with an answer, and none in the half for "
            f"--split {split}; allowed: more"
        )
    return Questions.of(half, digest(text))


def _squad(file: Any) -> Iterator[Question]:
    for article in file["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
                if answers:
                    yield Question(question["question"], answers, (paragraph["context"],))


def _hotpotqa(file: Any) -> Iterator[Question]:
    for row in file:
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
        yield Question(row["question"], (row["answer"],), documents)


READERS: dict[str, Callable[[Any], Iterator[Question]]] = {"squad": _squad, "hotpotqa": _hotpotqa}
NAMES = {"squad": "SQuAD", "hotpotqa": "HotpotQA"}


def _answer(source: Questions, size: int, rng: Random, place: float) -> Problem:
    asked = source.questions[round(place * (len(source.questions) - 1))]
    others = [document for document in source.documents if document not in asked.documents]
    documents = [*asked.documents, *rng.sample(others, min(size, len(others)))]
    rng.shuffle(documents)
    listed = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
    return Problem(
        f"{ORDER}\n\nThe following are given documents.\n\n{listed}\n\n{ORDER}\n\nQuestion: {asked.text}",
        "Answer:",
        asked.answers,
    )


def _task(about: str, option: str) -> Task:
    return Task(_answer, any_of, about, least=1, most=lambda source: len(source.documents), needs=option)


TASKS = {
    "qa_1": _task("a question of SQuAD among its paragraphs", "squad"),
    "qa_2": _task("a question of HotpotQA among its documents", "hotpotqa"),
}

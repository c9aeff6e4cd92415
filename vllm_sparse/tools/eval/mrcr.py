"""Conversations with 2, 4 or 8 replies to one request, of which one is to be repeated.

After OpenAI's MRCR (data set ``openai/mrcr``, April 2025), which follows the multi-round co-reference resolution
of Vodrahalli et al., "Michelangelo", arXiv 2409.12640 (2024). A user asks again and again for pieces of writing;
2, 4 or 8 requests are the same; the last message asks for the reply to the i-th of them behind a random prefix.
Scored as there: 0 unless the output begins with the prefix, else ``difflib``'s ratio of the rest and the reply.
Replies there are a model's; here, to be made offline, they are runs of sentences of the given text, so what
tells them apart is the order alone. The question has no worked example before it.
"""

from __future__ import annotations

import string
from difflib import SequenceMatcher
from random import Random

from vllm_sparse.tools.eval.problems import Problem, Source, Task

FORMATS = ("poem", "blog post", "short story", "news article", "speech", "letter", "review", "riddle")
TOPICS = 6
"""Topics of a conversation: few, so that requests resemble each other."""
REPLY_WORDS = 40
PREFIX_LETTERS = 10


def score(output: str, answers: tuple[str, ...]) -> float:
    """``answers``: the prefix and the reply."""
    prefix, reply = answers
    return SequenceMatcher(None, output.removeprefix(prefix), reply).ratio() if output.startswith(prefix) else 0.0


def _reply(source: Source, first: int) -> str:
    """Whole sentences from the ``first`` on, until they have :data:`REPLY_WORDS` words."""
    words: list[str] = []
    while len(words) < REPLY_WORDS:
        words += source.sentences[first % len(source.sentences)].split()
        first += 1
    return " ".join(words[: 2 * REPLY_WORDS])


def _conversation(needles: int):
    def make(source: Source, size: int, rng: Random, place: float) -> Problem:
        topics = rng.sample(source.words, TOPICS)
        requests = [(kind, topic) for kind in FORMATS for topic in topics]
        asked = requests.pop(rng.randrange(len(requests)))
        turns = [rng.choice(requests) for _ in range(size)]
        for _ in range(needles):
            turns.insert(rng.randrange(len(turns) + 1), asked)
        start = rng.randrange(len(source.sentences))
        # Far enough apart to have no sentence in common, as long as the text lasts.
        apart = max(1, len(source.sentences) // len(turns))
        history = [
            (f"Write a {kind} about {topic}", _reply(source, start + apart * number))
            for number, (kind, topic) in enumerate(turns)
        ]
        replies = [reply for turn, (_, reply) in zip(turns, history, strict=True) if turn == asked]
        wanted = rng.randrange(needles)
        prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=PREFIX_LETTERS))
        kind, topic = asked
        return Problem(
            f"Prepend {prefix} to the {_ordinal(wanted + 1)} (1 indexed) {kind} about {topic}. Do not include any "
            f"other text in your response.",
            "",
            (prefix, replies[wanted]),
            history=tuple(history),
        )

    return make


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


TASKS = {
    f"mrcr_{needles}": Task(
        _conversation(needles), score, f"one of {needles} replies to the same request, repeated", room=1.25
    )
    for needles in (2, 4, 8)
}

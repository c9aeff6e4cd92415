"""One long context and several turns about it, over a prefix cache that holds the model's own sparse answers.

After SCBench (Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods", arXiv 2412.10319,
December 2024), its string retrieval with a shared context in the mode of several turns. Each turn asks for the
numbers of four keys, as RULER's ``niah_multiquery`` does, and is asked after the model's own answers to the
turns before. Their keys and values, which sparse decode steps wrote, are found in the prefix cache: an error of
an early turn can spoil a later one. The score is the mean over turns of the share of right numbers.
"""

from __future__ import annotations

from random import Random

from vllm_sparse.tools.eval import ruler
from vllm_sparse.tools.eval.problems import Problem, Source, Task, all_of

TURNS, KEYS = 5, 4


def _turns(source: Source, size: int, rng: Random, place: float) -> Problem:
    # Keys of one word each: no key's words are in another.
    words = rng.sample(source.words, 2 * TURNS * KEYS)
    keys = ["-".join(pair) for pair in zip(words[::2], words[1::2], strict=True)]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), len(keys))]
    needles = [(rng.random(), ruler.needle(key, number)) for key, number in zip(keys, numbers, strict=True)]
    context = source.haystack(size, needles, rng)
    turns = []
    for first in range(0, len(keys), KEYS):
        asked, start = ruler.question(keys[first : first + KEYS], KEYS)
        turns.append(Problem(asked, start, tuple(numbers[first : first + KEYS])))
    begin = ruler.hidden("number", True, True)
    return Problem(
        f"{begin}\n{context}\n{turns[0].text}",
        turns[0].answer_start,
        turns[0].answers,
        follow_ups=tuple(turns[1:]),
    )


TASKS = {"many_turns": Task(_turns, all_of, f"numbers of {KEYS} keys in each of {TURNS} turns about one text")}

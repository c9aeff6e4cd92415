"""Long programs to trace, a line a step: what a step attends to is far away in the text, or in the answer itself.

Execution of programs as in Zaremba and Sutskever, "Learning to Execute", arXiv 1410.4615 (2014), and chains of
arithmetic hidden in long texts as in Zhou et al., "GSM-Infinite", arXiv 2502.05252 (February 2025). The steps of
a program are scattered over the text in order; the answer repeats each and says its result. So every line must
find its step in the text, and its operands among lines that decode steps wrote. All tokens of an answer but the
first were attended sparsely.

- ``trace_easy``: 16 steps that each give ``x`` a number: to trace it is to find the next step.
- ``trace``: 48 steps, of which 40 are sums and differences of eight variables, modulo 100.

A program checks the answer. The score is the share of right lines: the step is the program's, its operands are
what the answer itself said last of these variables, its result is theirs. A wrong result costs its own line, not
all that follow.
"""

from __future__ import annotations

import re
from random import Random

from vllm_sparse.tools.eval.problems import Problem, Source, Task

LINE = re.compile(r"Step (\d+):\s*(\w) = (?:\((\w) ([+-]) (\w)\) % 100 = \((\d+) [+-] (\d+)\) % 100 = )?(\d+)\b")
VARIABLES = "abcdefgh"
EASY_STEPS, STEPS = 16, 48
EXAMPLE = (
    "For example, of the program Step 1: x = 70. Step 2: y = 45. Step 3: z = (x + y) % 100. you would write\n"
    "Step 1: x = 70.\nStep 2: y = 45.\nStep 3: z = (x + y) % 100 = (70 + 45) % 100 = 15.\n"
)


def score(output: str, answers: tuple[str, ...]) -> float:
    """The share of right lines; ``answers``: all lines that were to be written."""
    expected = [LINE.match(line) for line in answers]
    # The answer's first words, which end in the first label, are no part of what was said.
    said = LINE.finditer(f"Step {expected[0][1]}:{output}")
    lines = {}
    for line in said:
        lines.setdefault(line[1], line)
    right, state = 0, {}
    for step in expected:
        line = lines.get(step[1])
        if line is None or line.group(2, 3, 4, 5) != step.group(2, 3, 4, 5):
            continue
        _, name, first, sign, second, *operands, result = line.groups()
        if first is None:
            right += result == step[8]
        else:
            values = [state.get(first), state.get(second)]
            right += [*map(_number, operands)] == values and _number(result) == _apply(sign, *values)
        state[name] = _number(result)
    return right / len(expected)


def _number(digits: str) -> int:
    # A model that repeats a digit without end writes no number that would be right.
    return int(digits[:9])


def _apply(sign: str, first: int, second: int) -> int:
    return (first + second if sign == "+" else first - second) % 100


def _easy(source: Source, size: int, rng: Random, place: float) -> Problem:
    steps = [f"Step {number}: x = {rng.randrange(100, 1000)}." for number in range(1, EASY_STEPS + 1)]
    text = (
        f"The steps of a program are hidden within the following text.\n{_scattered(source, size, steps, rng)}\n"
        f"Write down the {len(steps)} steps of the program in order, each on a line of its own."
    )
    return Problem(text, f"{steps[0]}\nStep 2:", tuple(steps[1:]))


def _program(source: Source, size: int, rng: Random, place: float) -> Problem:
    state: dict[str, int] = {}
    steps, lines = [], []
    for number in range(1, STEPS + 1):
        if len(state) < len(VARIABLES):
            name = VARIABLES[len(state)]
            state[name] = rng.randrange(100)
            steps.append(f"Step {number}: {name} = {state[name]}.")
            lines.append(steps[-1])
            continue
        name, first, second, sign = *rng.choices(VARIABLES, k=3), rng.choice("+-")
        values = state[first], state[second]
        state[name] = _apply(sign, *values)
        steps.append(f"Step {number}: {name} = ({first} {sign} {second}) % 100.")
        worked = f"({values[0]} {sign} {values[1]}) % 100 = {state[name]}."
        lines.append(f"{steps[-1][:-1]} = {worked}")
    text = (
        f"The steps of a program are hidden within the following text.\n{_scattered(source, size, steps, rng)}\n"
        f"Carry out the {len(steps)} steps of the program in order. Write a line for each with its values and its "
        f"result, and nothing else. {EXAMPLE}Differences are taken modulo 100, too: (20 - 50) % 100 = 70."
    )
    return Problem(text, "Step 1:", tuple(lines))


def _scattered(source: Source, size: int, steps: list[str], rng: Random) -> str:
    depths = sorted(rng.random() for _ in steps)
    return source.haystack(size, list(zip(depths, steps, strict=True)), rng)


TASKS = {
    "trace_easy": Task(_easy, score, f"{EASY_STEPS} assignments of a program, in order", room=1.1),
    "trace": Task(_program, score, f"{STEPS} steps of a program with eight variables", room=1.1),
}

"""Steps that ``benchmarks/engine.py`` times: those in which every request of a batch decodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import engine
from benchmarks.batch_spec import parse

TOKENS = 8


class Engine:
    """Requests with a token in each of their steps; ``steps`` says which take part in which step."""

    def __init__(self, steps: list[list[int]]):
        self.steps, self.names, self.counts = steps, [], {}

    def add_request(self, name, prompt, params) -> None:
        self.names.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps)

    def step(self) -> list:
        found = []
        for index in self.steps.pop(0):
            name = self.names[index]
            self.counts[name] = self.counts.get(name, 0) + 1
            output = SimpleNamespace(token_ids=[0] * self.counts[name])
            found.append(SimpleNamespace(request_id=name, outputs=[output]))
        return found


@pytest.mark.parametrize("alone", [0, 2])
def test_steps_of_all_requests_are_timed(alone):
    steps = [[]] + [[0]] * alone + [[0, 1]] * (TOKENS - alone) + [[1]] * alone
    found = engine.time_batch(Engine(steps), parse("2q1s64"), SimpleNamespace(max_tokens=TOKENS))
    assert found["steps"] == TOKENS - alone - 1
    assert found["ttft_ms"] > 0 and found["tpot_ms"] > 0


def test_batch_in_turns_is_not_timed():
    """A batch that takes turns is not timed."""
    steps = [[0]] * TOKENS + [[1]] * TOKENS
    found = engine.time_batch(Engine(steps), parse("2q1s64"), SimpleNamespace(max_tokens=TOKENS))
    assert "may not hold" in found["reason"]

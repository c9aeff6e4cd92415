"""The benchmark of drafts asks for a copy of what the prompt holds, and tells where answers part."""

from __future__ import annotations

import argparse
import json

from benchmarks import drafts


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def test_prompts_end_with_the_beginning_of_what_they_hold():
    for prompt in drafts.prompts(Bytes(), 40000):
        text = Bytes().decode(prompt)
        passage, again = text.split("\n\n# The function once more:\n")
        assert len(prompt) == 40000 and again.startswith("\n    def ") and again in passage


def test_rows_say_where_answers_leave_those_of_stock():
    args = drafts.parse_args(["--context", "100", "--tokens", "3", "--sparse", '{"budget_tokens": 512}'])
    assert isinstance(args, argparse.Namespace)
    stock = {"environment": {"gpu": "none"}, "answers": [[1, 2, 3], [4, 5, 6]], "tokens_per_s": 10.0,
             "tokens_per_step": 1.0}  # fmt: skip
    found = {**stock, "answers": [[1, 2, 3], [4, 7, 6]], "tokens_per_s": 25.0, "tokens_per_step": 2.5,
             "budget": 512, "policy": "midbound"}  # fmt: skip
    row = drafts.row_of(args, ("sparse", 3), found, stock)
    assert (row["same_tokens"], row["speedup"], row["drafts"], row["default"]) == ([-1, 1], 2.5, 3, False)
    assert json.loads(json.dumps(row)) == row

"""Which prefill pattern each query head of a model has, and the file that `vllm-sparse tune` leaves of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_sparse import model_files
from vllm_sparse.errors import TableError
from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.user_text import is_number, shown

FORMAT = 1
FILE_NAME, FOLDER = "vllm_sparse_patterns.json", "patterns"
LEAST_TOP_P = 1e-6
"""Least share that is not 0; in 32 bits, a smaller one may be 0 all the same."""


def pattern_from_mapping(values: Any) -> HeadPattern:
    """A :class:`HeadPattern` from a JSON object that has each of its keys.

    Raises:
        TableError: it has not, or a value that cannot be; says what is allowed.
    """
    known = [field.name for field in fields(HeadPattern)]
    if not isinstance(values, dict) or set(values) != set(known):
        raise TableError(f"has the candidate {shown(values)}, not an object of {', '.join(known)}")
    sizes, share = [values[name] for name in known[:-1]], values["top_p"]
    whole = all(type(n) is int and 0 <= n < 2**31 for n in sizes)
    if not whole or not is_number(share, 0, 1) or 0 < share < LEAST_TOP_P:
        raise TableError(
            f"has the candidate {shown(values)}; allowed: tokens from 0 on, up to {2**31 - 1}, "
            f"a top_p of 0 to 1, from {LEAST_TOP_P}"
        )
    return HeadPattern(*sizes, float(share))


@dataclass(frozen=True)
class PatternTable:
    """Patterns of all query heads of a model, whatever the ranks that serve it."""

    candidates: tuple[HeadPattern, ...]
    choices: tuple[tuple[int, ...] | None, ...]
    """[num_layers][q_heads], indices of candidates; None: a layer that none were sought for."""

    @classmethod
    def from_mapping(cls, values: Any) -> PatternTable:
        """Check and build a table from ``{"candidates": [...], "patterns": [...]}``; other keys are not read."""
        if not isinstance(values, dict) or not isinstance(values.get("candidates"), list):
            raise TableError("has no list of 'candidates'")
        candidates = tuple(map(pattern_from_mapping, values["candidates"]))
        rows = values.get("patterns")
        if not isinstance(rows, list) or not all(row is None or isinstance(row, list) for row in rows):
            raise TableError("has no list of 'patterns' for each layer")
        for choice in (choice for row in rows for choice in row or ()):
            if type(choice) is not int or not 0 <= choice < len(candidates):
                raise TableError(f"has the pattern {shown(choice)}; allowed: 0 to {len(candidates) - 1}")
        return cls(candidates, tuple(None if row is None else tuple(row) for row in rows))

    def to_mapping(self) -> dict:
        """What :meth:`from_mapping` reads, as plain JSON."""
        rows = [None if row is None else list(row) for row in self.choices]
        return {"candidates": [asdict(candidate) for candidate in self.candidates], "patterns": rows}

    def of_layer(self, layer: int, rank: int, ranks: int, q_heads: int) -> list[HeadPattern] | None:
        """Patterns of the ``q_heads`` query heads of ``layer`` that one of ``ranks`` tensor-parallel ranks holds.

        Rank r holds the r-th slice of the heads; a layer that is not split holds all on every rank. None
        where the table has none for this layer, or for another number of heads (a draft model's layers).
        """
        row = self.choices[layer] if layer < len(self.choices) else None
        if row is None or len(row) not in (q_heads, q_heads * ranks):
            return None
        first = 0 if q_heads == len(row) else rank * q_heads
        return [self.candidates[choice] for choice in row[first : first + q_heads]]


def default_path(model: str) -> Path:
    """Where the patterns of a model directory or of a hub name lie unless somebody says otherwise."""
    return model_files.default_path(model, FILE_NAME, FOLDER)


def read(path: Path, num_layers: int, q_heads: int, model: str = "") -> PatternTable:
    """The patterns in ``path`` for a model of ``num_layers`` layers and ``q_heads`` query heads.

    Args:
        model: its name, compared with the one in the file unless it is empty.

    Raises:
        TableError: the file has no patterns, or those of another model; says which value was wrong.
    """
    content = model_files.read_json(path, format=FORMAT, num_layers=num_layers, q_heads=q_heads)
    table = PatternTable.from_mapping(content)
    if len(table.choices) != num_layers or any(row is not None and len(row) != q_heads for row in table.choices):
        raise TableError(f"does not have {num_layers} rows of {q_heads} patterns")
    model_files.check_model(content, model)
    return table


def write(path: Path, table: PatternTable, q_heads: int, **found: Any) -> None:
    """Leave ``table`` in ``path`` for :func:`read`; ``found`` says where it comes from."""
    head = {"format": FORMAT, "num_layers": len(table.choices), "q_heads": q_heads}
    model_files.write_json(path, {**head, **found, **table.to_mapping()})

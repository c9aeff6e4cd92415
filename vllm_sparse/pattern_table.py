"""Which prefill pattern each query head of a model has, and the file that `vllm-sparse tune` leaves of it."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_sparse import same_model, user_text
from vllm_sparse.user_text import TextError, is_number, shown

logger = logging.getLogger("vllm.vllm_sparse")

FORMAT = 1
FILE_NAME = "vllm_sparse_patterns.json"
LEAST_COVERAGE = 1e-6
"""Of a candidate's that is not 0; in 32 bits, less may be 0 all the same."""


class TableError(ValueError):
    """A file or object that holds nothing for this model's heads; the message says why."""


@dataclass(frozen=True)
class HeadPattern:
    """Columns and diagonals that one query head keeps; sinks and the recent window come on top.

    The patterns of Jiang et al., "MInference 1.0", arXiv 2407.02490: with ``recent_tokens`` alone a head
    is an A-shape, otherwise vertical-slash.
    """

    vertical_tokens: int = 0
    """Columns, in whole pages, where ``coverage`` is 0."""
    slash_tokens: int = 0
    """Diagonals, in bands of a page, where ``coverage`` is 0."""
    recent_tokens: int = 0
    """Diagonals nearest to the query, in bands of a page, whatever the estimate says of them."""
    coverage: float = 0.0
    """Share of the estimated attention that columns and diagonals hold; 0: the sizes above."""

    @classmethod
    def from_mapping(cls, values: Any) -> HeadPattern:
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(known):
            raise TableError(f"has the candidate {shown(values)}, not an object of {', '.join(known)}")
        sizes, share = [values[name] for name in known[:-1]], values["coverage"]
        whole = all(type(n) is int and 0 <= n < 2**31 for n in sizes)
        if not whole or not is_number(share, 0, 1) or 0 < share < LEAST_COVERAGE:
            raise TableError(
                f"has the candidate {shown(values)}; allowed: tokens from 0 on, up to {2**31 - 1}, "
                f"a coverage of 0 to 1, from {LEAST_COVERAGE}"
            )
        return cls(*sizes, float(share))


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
        candidates = tuple(map(HeadPattern.from_mapping, values["candidates"]))
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


def default_path(model: str, file_name: str = FILE_NAME, folder: str = "patterns") -> Path:
    """Where the patterns of a model directory or of a hub name lie unless somebody says otherwise."""
    # Offline, vLLM replaces a hub name by the place of its snapshot.
    snapshot = same_model.SNAPSHOT.search(model)
    if snapshot is None and os.path.isdir(model):
        return Path(model) / file_name
    name = snapshot[1] if snapshot else model.replace("/", "--")
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # a user may have no home
    return Path(root) / "vllm-sparse" / folder / f"{name}.json"


def read_json(path: Path, **wanted: int) -> dict:
    """The object in ``path``, in which each key of ``wanted`` has its value.

    Raises:
        TableError: it is not there, or another one; says which value was wrong.
    """
    try:
        content = user_text.read_json(path)
    except TextError as error:
        raise TableError(str(error)) from None
    if not isinstance(content, dict):
        raise TableError("is not a JSON object")
    for key, value in wanted.items():
        if type(content.get(key)) is not int or content[key] != value:
            raise TableError(f"has {key} {shown(content.get(key))}, this needs {value}")
    return content


def check_model(content: dict, model: str) -> None:
    """Raise :class:`TableError` where a file's content was made for another model than ``model``."""
    recorded = content.get("model")
    if not model or recorded is None:
        return
    if not isinstance(recorded, str):
        raise TableError(f"has model {shown(recorded)}, this needs a name")
    same = same_model.is_same(recorded, content.get("weights"), model)
    if same is None:
        logger.warning(
            "sparse attention: a file that was made for %s is taken for the directory %s, as for a copy of it; "
            "only a file with \"weights\", as `vllm-sparse tune` writes now, can tell",
            recorded, model,
        )  # fmt: skip
    elif not same:
        raise TableError(
            f"was made for the model {shown(recorded)}, not for {model!r}. Where it is meant for both, write "
            f'"model": {json.dumps(model)} into it'
        )


def read(path: Path, num_layers: int, q_heads: int, model: str = "") -> PatternTable:
    """The patterns in ``path`` for a model of ``num_layers`` layers and ``q_heads`` query heads; ``model``: its
    name, where it is to be compared.

    Raises:
        TableError: they are no patterns, or those of another model; says which value was wrong.
    """
    content = read_json(path, format=FORMAT, num_layers=num_layers, q_heads=q_heads)
    table = PatternTable.from_mapping(content)
    if len(table.choices) != num_layers or any(row is not None and len(row) != q_heads for row in table.choices):
        raise TableError(f"does not have {num_layers} rows of {q_heads} patterns")
    check_model(content, model)
    return table


def write(path: Path, table: PatternTable, q_heads: int, **found: Any) -> None:
    """Leave ``table`` in ``path`` for :func:`read`; ``found`` says where it comes from."""
    head = {"format": FORMAT, "num_layers": len(table.choices), "q_heads": q_heads}
    write_json(path, {**head, **found, **table.to_mapping()})


def write_json(path: Path, content: dict) -> None:
    """Write one line a key; the file is whole or the one before, whenever the process ends."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(f"{{\n{lines}\n}}\n")
    fresh.replace(path)

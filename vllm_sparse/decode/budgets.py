"""BudgetTable: shares of the decode budget of a model's KV heads, and the file that `tune --decode` leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_sparse import model_files
from vllm_sparse.errors import TableError
from vllm_sparse.user_text import is_number, shown

FORMAT = 1
FILE_NAME, FOLDER = "vllm_sparse_budgets.json", "budgets"
LEAST, MOST = 1e-4, 1e4
"""Bounds of a share; `vllm-sparse tune` gives 0.25 to 2."""


@dataclass(frozen=True)
class BudgetTable:
    """Shares of ``budget_tokens`` of all KV heads of a model, whatever the ranks that serve it."""

    shares: tuple[tuple[float, ...] | None, ...]
    """[num_layers][kv_heads]; None: a layer whose heads have the budget itself."""

    @classmethod
    def from_mapping(cls, values: Any) -> BudgetTable:
        """Check and build a table from ``{"shares": [...]}``; other keys are not read."""
        rows = values.get("shares") if isinstance(values, dict) else None
        if not isinstance(rows, list) or not all(row is None or isinstance(row, list) for row in rows):
            raise TableError("has no list of 'shares' for each layer")
        for share in (share for row in rows for share in row or ()):
            if not is_number(share, LEAST, MOST):
                raise TableError(f"has the share {shown(share)}; allowed: numbers above 0, {LEAST:g} to {MOST:g}")
        return cls(tuple(None if row is None else tuple(map(float, row)) for row in rows))

    def to_mapping(self) -> dict:
        """What :meth:`from_mapping` reads, as plain JSON."""
        return {"shares": [None if row is None else list(row) for row in self.shares]}

    @cached_property
    def largest(self) -> float:
        """The largest share; heads without one have the budget itself."""
        return max([1.0, *(share for row in self.shares for share in row or ())])

    def scaled(self, first_layer: int) -> BudgetTable:
        """This table without layers before ``first_layer``, which run dense; the mean of the others is 1."""
        rows = [row if layer >= first_layer else None for layer, row in enumerate(self.shares)]
        shares = [share for row in rows for share in row or ()]
        if not shares:
            return BudgetTable(tuple(rows))
        mean = math.fsum(shares) / len(shares)
        return BudgetTable(tuple(None if row is None else tuple(share / mean for share in row) for row in rows))

    def of_layer(self, layer: int, rank: int, ranks: int, kv_heads: int) -> tuple[float, ...] | None:
        """Shares of the ``kv_heads`` KV heads of ``layer`` that one of ``ranks`` tensor-parallel ranks holds.

        Rank r holds the r-th slice of the heads, or one that it shares with its neighbours where there are fewer
        heads than ranks; a layer that is not split holds all on every rank. None where the table has none for
        this layer, or for another number of heads (a draft model's layers).
        """
        row = self.shares[layer] if layer < len(self.shares) else None
        if row is None or len(row) == kv_heads:
            return row
        if kv_heads != max(1, len(row) // ranks):
            return None
        first = rank * len(row) // ranks
        return row[first : first + kv_heads]


def default_path(model: str) -> Path:
    """Where the budgets of a model directory or of a hub name lie unless somebody says otherwise."""
    return model_files.default_path(model, FILE_NAME, FOLDER)


def read(path: Path, num_layers: int, kv_heads: int, model: str = "") -> BudgetTable:
    """The budgets in ``path`` for a model of ``num_layers`` layers and ``kv_heads`` KV heads.

    Args:
        model: its name, compared with the one in the file unless it is empty.

    Raises:
        TableError: the file has no budgets, or those of another model; says which value was wrong.
    """
    content = model_files.read_json(path, format=FORMAT, num_layers=num_layers, kv_heads=kv_heads)
    table = BudgetTable.from_mapping(content)
    if len(table.shares) != num_layers or any(row is not None and len(row) != kv_heads for row in table.shares):
        raise TableError(f"does not have {num_layers} rows of {kv_heads} shares")
    model_files.check_model(content, model)
    return table


def write(path: Path, table: BudgetTable, kv_heads: int, **found: Any) -> None:
    """Leave ``table`` in ``path`` for :func:`read`; ``found`` says where it comes from."""
    head = {"format": FORMAT, "num_layers": len(table.shares), "kv_heads": kv_heads}
    model_files.write_json(path, {**head, **found, **table.to_mapping()})

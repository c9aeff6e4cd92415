"""Rows: one JSON line per sample and setting, each on disk as soon as it is measured."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.eval.tasks import RENAMED

KEY = (
    "model", "device", "dtype", "kv_dtype", "tp", "page_size", "chunk", "text", "score_tokens", "sparse", "split",
    "task", "length", "seed", "policy", "budget", "prefill_policy", "top_p",
    "more", "kv_skip_layers",
)  # fmt: skip
"""Names of all that a measurement depends on; a row with the same values is not measured again."""
CACHE = ("kv_dtype", "kv_skip_layers")
"""Those of the KV cache, in which rows of one file may differ and be compared."""
BEGINNING = '{"vllm": "'
"""Order of a row's line: :func:`environment` comes first."""


def commit(root: Path) -> str | None:
    """Commit of the checkout at ``root``, with ``+`` where its package differs from it.

    None for a plain install, also inside a checkout of something else.
    """

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)

    try:
        top = git("rev-parse", "--show-toplevel")
        head = git("rev-parse", "--short", "HEAD")
        if top.returncode or head.returncode or Path(top.stdout.rstrip("\n")) != root.resolve():
            return None
        changed = git("diff", "--quiet", "HEAD", "--", "vllm_sparse", "kernels").returncode
        return head.stdout.strip() + ("+" if changed else "")
    except OSError:
        return None


def environment() -> dict[str, Any]:
    """Versions, commit and date, which a row records beside its key."""
    import torch
    import vllm

    import vllm_sparse

    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "vllm_sparse": vllm_sparse.__version__,
        "commit": commit(Path(vllm_sparse.__file__).parent.parent),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def current(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` as one of today: older ones have old names, and lack the cache's dtype, of when there was one."""
    return {"kv_dtype": row.get("dtype"), **row, "task": RENAMED.get(row["task"], row["task"])}


def cache_of(row: dict[str, Any]) -> str:
    """What the KV cache of a row holds, in words."""
    skipped = row.get("kv_skip_layers")
    return f"KV in {row['kv_dtype']}" + (f", without layers {', '.join(skipped)}" if skipped else "")


def key_of(row: dict[str, Any]) -> str:
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


class Rows:
    """The rows of a file; a line that a killed run left half written is dropped."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError:
            raise self._refusal(1) from None
        *lines, last = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row["policy"]
                row = current(row)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._refusal(number) from None
            self.rows.append(row)
        if last:
            if not last.startswith(BEGINNING[: len(last)]):
                raise self._refusal(len(lines) + 1)
            path.write_text(text[: len(text) - len(last)], encoding="utf-8")
            print(f"{path}: the last line was cut off; it is measured again", flush=True)
        self._of_key = {key_of(row): row for row in self.rows}

    def _refusal(self, number: int) -> ConfigError:
        return ConfigError(
            f"--out: line {number} of {self.path} is no result of `vllm-sparse eval`; allowed: its own file, "
            f"which it continues, or a new one"
        )

    def has(self, key: dict[str, Any]) -> bool:
        return key_of(key) in self._of_key

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return self._of_key.get(key_of(key))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                self.rows.append(row)
                self._of_key[key_of(row)] = row

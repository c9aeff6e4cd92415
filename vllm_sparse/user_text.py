"""What users write, read strictly and named in errors: JSON, files, numbers and values of any kind."""

from __future__ import annotations

import difflib
import json
import math
import os
import stat
from typing import Any

from vllm_sparse.errors import TextError

MOST_FILE_BYTES = 64 << 20
"""Limit that no file of settings, patterns or budgets comes near; one of weights, named by mistake, does."""
MOST_SHOWN = 120
"""Characters of a value in an error."""


def shown(value: Any) -> str:
    """``repr`` of a value for an error, cut where it is long; values of any size and depth are taken."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def parse_json(content: str | bytes) -> Any:
    """The value that JSON in UTF-8 holds; unlike :func:`json.loads` it takes no key twice.

    Raises:
        TextError: "not valid JSON", and why.
    """
    try:
        return _parse(content)
    except TextError as error:
        raise TextError(f"not valid JSON ({error})") from None


def _parse(content: str | bytes) -> Any:
    try:
        text = content.decode() if isinstance(content, bytes) else content
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        why = f"no UTF-8 text: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        why = str(error)
    except RecursionError:
        why = "it is nested too deeply"
    except TextError:
        raise
    except ValueError:  # Python reads no numbers of more than 4,300 digits
        why = "a number has thousands of digits"
    raise TextError(why)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TextError(f"the key {shown(key)} comes twice")
        found[key] = value
    return found


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a regular file; another kind is refused, as reading a pipe would wait for its writer.

    Raises:
        TextError: "cannot be read", and why.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            why = "it is a directory"
        elif not stat.S_ISREG(found.st_mode):
            why = "it is no regular file"
        elif found.st_size > MOST_FILE_BYTES:
            why = f"it has {found.st_size:,} bytes; allowed: up to {MOST_FILE_BYTES:,}"
        else:
            with open(path, "rb") as file:
                return file.read()
    except OSError as error:
        why = error.strerror
    except ValueError as error:  # a zero byte, or what no file system can encode
        why = str(error)
    raise TextError(f"cannot be read ({why})")


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in a file.

    Raises:
        TextError: "cannot be read" or "is not JSON", and why.
    """
    content = read_file(path)
    try:
        return _parse(content)
    except TextError as error:
        raise TextError(f"is not JSON ({error})") from None


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether ``value`` is a finite number from ``least`` to ``most``; a bool is none."""
    return type(value) in (int, float) and least <= value <= most and math.isfinite(value)


def nearest(word: Any, known: list[str]) -> str:
    """A suggestion and the allowed words, for an error about a word that is none of ``known``."""
    word = word.strip().casefold() if isinstance(word, str) else ""
    begun = [name for name in known if word and name.startswith(word)]
    match = begun or difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean {match[0]!r}?" if match else ""
    return f"{hint} Allowed: {', '.join(known)}"

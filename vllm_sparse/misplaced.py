"""Settings in the wrong place: what looks like ours in vLLM's ``additional_config`` but would be read by nobody.

Other plugins have keys of their own there, so only what can hardly be theirs counts.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from typing import Any

from vllm_sparse.user_text import shown

KEY = "sparse"
ALIKE = ("sparse", "vllmsparse", "sparseconfig", "sparseattention", "sparsesettings", "vllmsparseconfig")
"""Keys that mean :data:`KEY`, in letters alone."""
EXAMPLE = '--additional-config \'{"sparse": {"budget_tokens": 2048}}\''


def find(additional: Any) -> list[str]:
    """One sentence for each thing in ``additional`` that is ours and in the wrong place."""
    if not isinstance(additional, dict):
        return []
    found = []
    for key, value in additional.items():
        if key == KEY or not isinstance(key, str):
            continue
        if means_sparse(key):
            found.append(
                f"additional_config[{shown(key)}] is not read; allowed: the key 'sparse', as in {EXAMPLE}."
            )
        elif place := _place(key, value):
            found.append(f"additional_config[{shown(key)}] is not read; allowed: additional_config{place}.")
        elif isinstance(value, dict) and _holds_ours(value):
            found.append(
                f"additional_config[{shown(key)}] holds settings of sparse attention and is not read; allowed: "
                f"the key 'sparse' of additional_config itself, as in {EXAMPLE}."
            )
    return found


def unread(additional: Any) -> list[str]:
    """One sentence for each thing in ``additional`` that is ours, where nothing of it is read."""
    if not isinstance(additional, dict):
        return []
    ours = additional.get(KEY)
    # An engine's settings reach its draft model's config in full, as nobody writes them.
    carried = isinstance(ours, dict) and set(ours) >= set(_names()[0])
    named = [] if KEY not in additional or carried else [f"additional_config[{KEY!r}] is not read."]
    return named + find(additional)


def hint(key: Any, source: str, inside: str = "") -> str:
    """Where ``key`` belongs, of an object that settings (or, ``inside``, a part of them) are read from; '' if that
    is not known."""
    settings, offload = _names()
    if not isinstance(key, str):
        return ""
    if means_sparse(key) or _letters(key) == "additionalconfig":
        return f' The settings stand in {source} itself, as in {{"budget_tokens": 2048}}.'
    name = _near(key, offload)
    if name and not inside:
        return f' {name!r} belongs into \'offload\', as in {{"offload": {{"{name}": ...}}}}.'
    name = _near(key, settings)
    if name and inside:
        return f" {name!r} belongs beside {inside!r}, not into it."
    return ""


def means_sparse(key: str) -> bool:
    """Whether a key is :data:`KEY`, misspelt or otherwise."""
    letters = _letters(key)
    near = letters[:1] in ("s", "v") and difflib.get_close_matches(letters, ALIKE[:2], 1, 0.8)  # no "parser"
    return letters in ALIKE or bool(near)


def _letters(key: str) -> str:
    return re.sub(r"[\W_]", "", key).casefold()


def _names() -> tuple[list[str], list[str]]:
    """Keys of the settings, and of ``offload`` in them."""
    from vllm_sparse.config import SparseConfig
    from vllm_sparse.offload.config import OffloadConfig

    return [field.name for field in fields(SparseConfig)], [field.name for field in fields(OffloadConfig)]


def _near(key: str, names: list[str]) -> str:
    word = key.strip().casefold().replace("-", "_")
    return next(iter(difflib.get_close_matches(word, names, 1, 0.9)), "")


def _place(key: str, value: Any) -> str:
    """Where a setting that stands beside :data:`KEY` belongs; '' if it is none."""
    settings, offload = _names()
    first, _, rest = key.partition(".")
    if rest and means_sparse(first):  # a path, as vLLM takes it in the option's own name
        key = rest
    name = _near(key, settings)
    if name and (name not in ("engine", "offload") or rest or _is_ours(name, value)):
        return f"['sparse'][{name!r}]"
    name = _near(key, offload)
    return f"['sparse']['offload'][{name!r}]" if name else ""


def _is_ours(name: str, value: Any) -> bool:
    """Whether a key whose name another plugin might use has a value of ours."""
    from vllm_sparse.attention.registry import ENGINES

    if name == "engine":
        return isinstance(value, str) and value in ("auto", *ENGINES)
    return isinstance(value, dict) and set(value) <= set(_names()[1])


def _holds_ours(value: dict) -> bool:
    if isinstance(value.get(KEY), dict):
        return True
    distinct = set(_names()[0]) - {"engine", "offload"}
    return any(isinstance(key, str) and key in distinct for key in value)

"""Settings in the wrong place: what looks like ours in vLLM's ``additional_config`` but would be read by nobody.

Other plugins have keys of their own there, so only what can hardly be theirs counts.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from vllm_sparse.user_text import shown

KEY = "sparse"
ALIKE = ("sparse", "vllmsparse", "sparseconfig", "sparseattention", "sparsesettings", "vllmsparseconfig")
"""Keys that mean :data:`KEY`, in letters alone."""
EXAMPLE = '--additional-config \'{"sparse": {"budget_tokens": 2048}}\''


@dataclass(frozen=True)
class Keys:
    """Names of all settings."""

    settings: tuple[str, ...]
    offload: tuple[str, ...]
    """Names of the settings in ``offload``."""


def find(additional: Any, keys: Keys) -> list[str]:
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
        elif place := _place(key, value, keys):
            found.append(f"additional_config[{shown(key)}] is not read; allowed: additional_config{place}.")
        elif isinstance(value, dict) and _holds_ours(value, keys):
            found.append(
                f"additional_config[{shown(key)}] holds settings of sparse attention and is not read; allowed: "
                f"the key 'sparse' of additional_config itself, as in {EXAMPLE}."
            )
    return found


def unread(additional: Any, keys: Keys) -> list[str]:
    """One sentence for each thing in ``additional`` that is ours, where nothing of it is read."""
    if not isinstance(additional, dict):
        return []
    ours = additional.get(KEY)
    # An engine's settings reach its draft model's config in full, as nobody writes them.
    carried = isinstance(ours, dict) and set(ours) >= set(keys.settings)
    named = [] if KEY not in additional or carried else [f"additional_config[{KEY!r}] is not read."]
    return named + find(additional, keys)


def hint(key: Any, source: str, keys: Keys, inside: str = "") -> str:
    """A sentence on where ``key`` belongs, or '' if that is not known.

    Args:
        key: an unknown key of an object that settings are read from.
        source: the object's name, for the sentence.
        inside: the setting whose value the object is, such as ``offload``; '' for all settings.
    """
    if not isinstance(key, str):
        return ""
    if means_sparse(key) or _letters(key) == "additionalconfig":
        return f' The settings stand in {source} itself, as in {{"budget_tokens": 2048}}.'
    name = _near(key, keys.offload)
    if name and not inside:
        return f' {name!r} belongs into \'offload\', as in {{"offload": {{"{name}": ...}}}}.'
    name = _near(key, keys.settings)
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


def _near(key: str, names: tuple[str, ...]) -> str:
    word = key.strip().casefold().replace("-", "_")
    return next(iter(difflib.get_close_matches(word, names, 1, 0.9)), "")


def _place(key: str, value: Any, keys: Keys) -> str:
    """Where a setting that stands beside :data:`KEY` belongs; '' if it is none."""
    first, _, rest = key.partition(".")
    if rest and means_sparse(first):  # a path, as vLLM takes it in the option's own name
        key = rest
    name = _near(key, keys.settings)
    of_offload = isinstance(value, dict) and set(value) <= set(keys.offload)  # other plugins may offload, too
    if name and (name != "offload" or rest or of_offload):
        return f"['sparse'][{name!r}]"
    name = _near(key, keys.offload)
    return f"['sparse']['offload'][{name!r}]" if name else ""


def _holds_ours(value: dict, keys: Keys) -> bool:
    if isinstance(value.get(KEY), dict):
        return True
    distinct = set(keys.settings) - {"offload"}
    return any(isinstance(key, str) and key in distinct for key in value)

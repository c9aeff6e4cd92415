"""Whether a file that was made for a model is of the model that is served: by name, or by its weights.

Names alone would refuse a copy of a hub model in a directory of another name; weights alone a quantized one.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
SAMPLES, SAMPLE_BYTES = 256, 4096
"""Read of each file: enough to tell fine-tunes apart, at any size in milliseconds."""


def is_same(recorded: str, weights: str | None, model: str) -> bool | None:
    """Whether ``recorded``, a model's name in a file, and its ``weights`` are those of ``model``.

    Both are names as for `vllm serve`: of a hub model, its snapshot on disk, or a directory. None where that
    cannot be told: a directory may be a copy of a hub model whose weights nobody recorded.
    """
    ours, theirs = _names(model), _names(recorded)
    if any(one[-1] == other[-1] and (len(one) != len(other) or one == other) for one in ours for other in theirs):
        return True
    if weights is None and os.path.isdir(model) and any(len(name) == 2 for name in theirs):
        return None
    return weights is not None and weights == weights_digest(model)


def _names(model: str) -> list[tuple[str, ...]]:
    """(owner, name) of a hub model; (name,) of a path, also of where it leads."""
    found = []
    for path in dict.fromkeys((model, os.path.realpath(model) if os.path.isdir(model) else model)):
        if snapshot := SNAPSHOT.search(path):
            found.append(tuple(snapshot[1].casefold().split("--", 1)))
        elif "://" in path or os.path.isabs(path) or path.startswith((".", "~")) or os.path.isdir(path):
            found.append((os.path.basename(os.path.abspath(path)).casefold(),))
        else:
            found.append(tuple(path.casefold().split("/", 1)))
    return found


def weights_digest(model: str) -> str | None:
    """A digest of samples of a model's weights; None where they are not on this disk."""
    folder = _folder(model)
    if folder is None:
        return None
    files = next((found for kind in WEIGHTS if (found := sorted(folder.glob(kind)))), [])
    digest = hashlib.sha256()
    try:
        for path in files:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError:
        return None
    return digest.hexdigest()[:32] if files else None


def _folder(model: str) -> Path | None:
    if os.path.isdir(model):
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path, or another address
        return None
    return Path(found).parent if isinstance(found, str) else None

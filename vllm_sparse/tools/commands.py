"""What the commands of `vllm-sparse` share: options of a model, a sample text, and where results may go."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sparse.backend import compat
from vllm_sparse.backend.model_config import query_heads
from vllm_sparse.config import MOST
from vllm_sparse.errors import ConfigError, TextError
from vllm_sparse.support import QUANTISED_CACHES
from vllm_sparse.user_text import MOST_SHOWN, parse_json, shown

CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_CI_ENV": "1"}
"""vLLM's own default on a CPU is a share of memory, which rarely is free."""


ALLOWED = "; allowed:"
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", *QUANTISED_CACHES)
MOST_RANKS = 4096
"""Most GPUs that one engine might have."""
MOST_REASON = 1000
"""Most characters of a reason that vLLM or another library gives."""


class Parser(argparse.ArgumentParser):
    """Refuses values as configurations are refused: one sentence that names option, value and what is allowed."""

    def error(self, message: str):
        if message.startswith("argument --") and ALLOWED in message:
            raise ConfigError(message.removeprefix("argument "))
        super().error(message)


def whole(least: int = 0, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number in these bounds."""

    def parse(text: str) -> int:
        value = _number(int, text)
        if value is None or not least <= value <= most:
            given = shown(text) if value is None else _short(text)
            raise argparse.ArgumentTypeError(f"{given}{ALLOWED} {least} or more, up to {most}, in whole numbers")
        return value

    return parse


def real(least: float = 0.0, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number in these bounds, or ``above`` the least of them."""

    def parse(text: str) -> float:
        value = _number(float, text)
        good = value is not None and math.isfinite(value) and least <= value <= most
        if not good or (above and value == least):
            given = shown(text) if value is None else _short(text)
            begin = f"above {least:.10g}" if above else f"{least:.10g} or more"
            end = f", up to {most:.10g}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{given}{ALLOWED} {begin}{end}")
        return value

    return parse


def _number(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN and text.isprintable() else shown(text)


def several(kind: Callable[[str], Any]) -> Callable[[str], list]:
    """The type of an option that is one or more of ``kind``, with commas."""

    def parse(text: str) -> list:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError(f"{shown(text)}{ALLOWED} one or more, with commas between them")
        return [kind(part) for part in parts]

    return parse


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        found = parse_json(text)
    except TextError as error:
        raise argparse.ArgumentTypeError(f"{error}{ALLOWED} a JSON object such as {{}}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{shown(found)}{ALLOWED} a JSON object such as {{}}")
    return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub name, as for `vllm serve`")
    parser.add_argument("--text", type=Path, help="sample text, UTF-8; default: the essays of the demo")
    parser.add_argument("--block-size", type=whole(1), help="tokens of a page; default: vLLM's")
    parser.add_argument("--tensor-parallel-size", type=whole(1, MOST_RANKS), default=1)
    parser.add_argument("--dtype", default="auto")
    add_kv_cache_dtype(parser)
    parser.add_argument("--trust-remote-code", action="store_true")


def add_kv_cache_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="as for `vllm serve`; default: auto"
    )


def model_config(args: argparse.Namespace):
    """vLLM's config of the model, without an engine.

    Raises:
        ConfigError: vLLM finds no model there, or cannot serve it with these options.
    """
    from vllm import EngineArgs

    if not args.model.strip():
        raise ConfigError(f"MODEL: {args.model!r}; allowed: a directory or a hub name")
    try:
        model = EngineArgs(
            model=args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        ).create_model_config()
    except Exception as error:  # of vLLM, Transformers, the hub, or the model's own code
        raise unusable_model(args, error) from error
    heads, ranks = query_heads(model.hf_text_config), args.tensor_parallel_size
    if heads % ranks:
        raise ConfigError(f"--tensor-parallel-size: {ranks}; allowed: what divides the model's {heads} heads")
    return model


def kv_dtype(asked: str, model: Any) -> str:
    """The dtype of the KV cache of an engine that is asked for ``asked``; ``model``: vLLM's config of it."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    found = compat.resolved_kv_dtype(resolve_kv_cache_dtype_string(asked, model), model)
    return "fp8" if found in QUANTISED_CACHES else found


def start_engine(args: argparse.Namespace, **settings: Any):
    """A vLLM engine that runs sparse.

    Raises:
        ConfigError: vLLM refuses model or settings.
    """
    from vllm import LLM

    settle_cpu()
    try:
        return LLM(
            args.model, attention_backend="sparse", dtype=args.dtype, trust_remote_code=args.trust_remote_code,
            tensor_parallel_size=args.tensor_parallel_size, block_size=args.block_size,
            kv_cache_dtype=args.kv_cache_dtype, **settings,
        )  # fmt: skip
    except ConfigError:
        raise
    except ValueError as error:  # also pydantic's, of a whole configuration
        raise unusable_model(args, error) from error


def tokenizer(args: argparse.Namespace, model: Any):
    """The tokenizer of vLLM's ``model`` config, without an engine.

    Raises:
        ConfigError: it has none.
    """
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    try:
        return cached_tokenizer_from_config(model)
    except Exception as error:
        raise unusable_model(args, error, "has no tokenizer that can be read") from error


def unusable_model(args: argparse.Namespace, error: Exception, problem: str = "cannot be used") -> ConfigError:
    """The error to raise for a model, with the part of ``error`` that says most."""
    dtype = "" if args.dtype == "auto" else f" with --dtype {args.dtype}"
    said = told(error)
    if args.model.startswith(("/", ".", "~")) and not Path(args.model).exists():  # the hub takes it for a name
        said = "there is no such directory"
    return ConfigError(f"MODEL: {shown(args.model)}{dtype} {problem}: {said}")


def told(error: BaseException) -> str:
    """What ``error`` says, on one line of bounded length."""
    said = str(error)
    if hasattr(error, "errors"):  # of pydantic's many lines, what was raised inside
        said = "; ".join(dict.fromkeys(_told_of_field(found) for found in error.errors()))
    said = " ".join(said.split()) or type(error).__name__
    return said if len(said) <= MOST_REASON else f"{said[:MOST_REASON]}..."


def _told_of_field(found: dict[str, Any]) -> str:
    """One of pydantic's errors, with the field that it is about where what was raised inside does not say."""
    message = found["msg"].removeprefix("Value error, ")
    field = next(iter(found.get("loc", ())), "")
    return message if message != found["msg"] or not field else f"{field}: {shown(found.get('input'))}: {message}"


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
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--text: {shown(str(path))} is no readable text ({why}); allowed: a UTF-8 file"
            ) from None
    try:
        from vllm_sparse.tools.demo.texts import essays

        return essays()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"--text: needed, since the essays of the demo cannot be had here ({error}); allowed: a UTF-8 file. "
            f"Or, in a checkout: pip install '.[demo]'"
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
            raise ConfigError(f"{option}: {_short(str(out))} is a directory; allowed: the path of a file")
        if out.exists() and not out.is_file():
            raise ConfigError(f"{option}: {_short(str(out))} is no regular file; allowed: the path of a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        if out.exists():
            with out.open("a"):
                pass
        with suppress(FileNotFoundError):  # the longest name that will be written
            os.stat(out.with_name(f"{out.name}.partial.{os.getpid()}"))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option}: {_short(str(out))} cannot be written ({why}); allowed: a place that can"
        ) from None

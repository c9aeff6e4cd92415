"""`vllm-sparse check MODEL`: what an engine of a model would do, before anything is loaded or started."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from vllm_sparse import support
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.attention.registry import ATTENTION_KERNELS, kernel_class
from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.config import MOST_GIB
from vllm_sparse.offload.sizing import GIB
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.support import Treatment
from vllm_sparse.tools import advice, commands, dry_offload
from vllm_sparse.tools import dry_engine as dry
from vllm_sparse.tools.dry_engine import DryEngine, EngineRefused
from vllm_sparse.tools.pays import Pays, forecast

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
"""At which steps are timed or forecast, as far as the engine takes them."""


class Status(str, Enum):
    """What comes of an engine; each has an exit status of its own."""

    SPARSE = "sparse"
    ERROR = "error"
    NOTHING = "nothing sparse"
    REFUSED = "refused"


EXIT = {Status.SPARSE: 0, Status.ERROR: 1, Status.NOTHING: 3, Status.REFUSED: 4}
EXIT_HELP = (
    "exit status: 0, some layers run sparse; 1, the model or an argument cannot be used; 2, the "
    "command line cannot be parsed; 3, the engine starts and no layer of it runs sparse; 4, it would be refused"
)


@dataclass
class Report:
    """What is found, as plain data."""

    model: str
    status: Status
    reason: str = ""
    """Why not sparse."""
    versions: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    pays: Pays | None = None
    min_context_tokens: int = 0
    """Up to which a request runs dense."""
    pays_unknown: str = ""
    """Why ``pays`` is None."""
    kernels: dict[str, str | None] = field(default_factory=dict)
    """Why each attention kernel cannot run here; None where it can."""
    advice: list[str] = field(default_factory=list)
    serve: str = ""

    def to_json(self) -> dict[str, Any]:
        found = {key: getattr(self, key) for key in ("model", "reason", "versions", "layers", "cache", "kernels")}
        found |= {"status": self.status.value, "exit_status": EXIT[self.status], "set": self.advice}
        found["pays"] = {"unknown": self.pays_unknown}
        if self.pays is not None:
            found["pays"] = {
                "measured": self.pays.measured, "source": self.pays.source, "from_tokens": self.pays.from_tokens,
                "min_context_tokens": self.min_context_tokens,
                "points": [vars(point) for point in self.pays.points],
            }  # fmt: skip
        return {**found, "serve": self.serve}


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="say what of a model would run sparse, what fits, and from which context it pays",
        description="Say what of a model would run sparse and why not all, how many tokens fit, from which "
        "context it pays, and what to set. Reads the model's configuration, no weights, and needs no GPU.",
        epilog=EXIT_HELP,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub name, as for `vllm serve`")
    gib = commands.real(0, MOST_GIB, above=True)
    parser.add_argument(
        "--gpu", type=gib, help="memory of each GPU, GiB; default: of the GPU here, if there is one"
    )
    parser.add_argument("--kv-gib", type=gib, help="GPU memory for KV as vLLM logs it; default: estimated")
    parser.add_argument("--sparse", type=commands.json_object, help="sparse settings as JSON")
    parser.add_argument(
        "--measure", action="store_true", help="time one layer's kernels on this GPU, in about a minute"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--vllm-args", nargs=argparse.REMAINDER, default=[], metavar="ARG",
        help="all that follows goes to `vllm serve`, such as --tensor-parallel-size 2; the last option",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print a report; returns the exit status.

    Raises:
        ConfigError: an argument or a model that cannot be used; with ``--json`` that is printed, too.
    """
    try:
        with dry.quiet():
            report = examine(args)
    except ConfigError as error:
        if args.json:
            print(json.dumps(Report(args.model, Status.ERROR, str(error)).to_json(), indent=2))
        raise
    print(json.dumps(report.to_json(), indent=2) if args.json else "\n".join(text(report)))
    return EXIT[report.status]


def examine(args: argparse.Namespace) -> Report:
    """The report on an engine.

    Raises:
        ConfigError: as in :func:`run`; never for an engine that would be refused.
    """
    dry.settle_platform()
    if args.measure and not torch.cuda.is_available():
        raise ConfigError("--measure: needs a GPU, and there is none here; allowed without one: a forecast")
    engine_args = dry.engine_args(args.model, args.vllm_args, args.sparse)
    report = Report(args.model, Status.SPARSE, versions=versions())
    try:
        engine = dry.dry_engine(engine_args)
        dry_offload.check_offload(engine)
    except EngineRefused as error:
        report.status, report.reason = Status.REFUSED, str(error)
        report.advice = ["what the refusal names as allowed"]
        report.serve = serve_line(args, sparse=False)
        return report
    config = SparseConfig.from_vllm(engine.vllm_config)
    line, any_sparse = support.summary_line(engine.decisions.values(), config, notes(engine, config))
    if not any_sparse:
        report.status, report.reason = Status.NOTHING, line
    report.min_context_tokens = config.min_context_tokens
    report.layers = layers(engine, line)
    report.cache = cache(args, engine, engine_args, config)
    shape = layer_shape(engine)
    if shape is not None:
        report.kernels = {name: kernel_class(name).unsupported(shape) for name in ATTENTION_KERNELS}
        find_pays(args, report, engine, config, shape)
    else:
        report.pays_unknown = "no layer runs sparse"
    report.advice = advice.advice(engine, config, report.cache)
    report.serve = serve_line(args, sparse=any_sparse)
    return report


def notes(engine: DryEngine, config: SparseConfig) -> list[str]:
    """What the start line says beside layers."""
    from vllm.v1.attention.backend import max_decode_query_len

    drafts = max_decode_query_len(engine.vllm_config) - 1
    return support.notes(config, drafts, compat.kv_dtype(engine.vllm_config))


def versions() -> dict[str, Any]:
    """Those of what matters, and whether this vLLM is supported."""
    from importlib.metadata import PackageNotFoundError, version

    import vllm

    found: dict[str, Any] = {"vllm": vllm.__version__, "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    (low, high), release = compat.TESTED, getattr(vllm, "__version_tuple__", (0, 0))[:2]
    found["supported"] = low <= release <= high
    found["tested"] = f"vLLM {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return found


def layers(engine: DryEngine, line: str) -> dict[str, Any]:
    """Layers by name and by what becomes of them; ``line``: that of the start."""
    decisions, by = engine.decisions, {treatment.value: Counter() for treatment in Treatment}
    for decision in decisions.values():
        by[decision.treatment.value][decision.reason] += 1
    specs = {name: spec for stage in engine.specs for name, spec in stage.items()}
    each = [
        {
            "name": name, "kind": type(layer).__name__, "runs": decisions[name].treatment.value,
            "reason": decisions[name].reason, "head_size": getattr(layer, "head_size", None),
            "kv_heads": getattr(layer, "num_kv_heads", None), "window": getattr(layer, "sliding_window", None),
            "sinks": getattr(getattr(layer, "impl", None), "sink_logits", None) is not None,
            "block_bytes": specs[name].page_size_bytes if name in specs else 0,
        }
        for name, layer in engine.attention.items()
    ]  # fmt: skip
    return {
        "line": line, "sparse": by["sparse"].total(), "dense": dict(by["dense"]), "stock": dict(by["stock"]),
        "attention": len(decisions), "linear": engine.linear_layers, "each": each,
        "kv_dtype": compat.kv_dtype(engine.vllm_config),
        "block_size": engine.vllm_config.cache_config.block_size,
        "drafts_listed": engine.vllm_config.speculative_config is None,
    }  # fmt: skip


def cache(args: argparse.Namespace, engine: DryEngine, engine_args: Any, config: SparseConfig) -> dict[str, Any]:
    """Tokens that fit the GPU, with and without the sparse backend."""
    max_model_len = engine.vllm_config.model_config.max_model_len
    found: dict[str, Any] = {"max_model_len": max_model_len, "weights_gib": round(engine.weight_bytes / GIB, 3)}
    found["weights_exact"] = engine.quantised
    gpu = args.gpu
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0).total_memory / GIB
    if gpu is None:
        return {**found, "unknown": "no GPU here; --gpu GIB says what fits one"}
    given = args.kv_gib
    if given is None and engine_args.kv_cache_memory_bytes:
        given = engine_args.kv_cache_memory_bytes / GIB
    utilization = engine_args.gpu_memory_utilization
    try:
        bytes_ = dry.kv_bytes(engine, gpu, utilization, given)
    except ConfigError as error:
        return {**found, "gpu_gib": gpu, "unknown": str(error)}
    found |= {"gpu_gib": round(gpu, 2), "kv_gib": round(bytes_ / GIB, 3), "estimated": given is None}
    if config.offload is not None:
        return {**found, "unknown": f"with sparse.offload; `vllm-sparse plan {args.model}` says what fits"}
    try:
        stock = dry.stock_of(engine, engine_args)
        found["stock_tokens"] = stock.tokens(bytes_)
    except ConfigError as error:
        found["stock_unknown"] = str(error)
    found["sparse_tokens"] = engine.tokens(bytes_)
    found["fits"] = found["sparse_tokens"] >= max_model_len or not any(engine.specs)
    return found


def layer_shape(engine: DryEngine) -> AttentionShape | None:
    """What attention kernels are asked about: the first layer that runs sparse, on the device of this machine."""
    from vllm.platforms import current_platform

    from vllm_sparse.backend.spec import SparseAttentionSpec
    from vllm_sparse.pages.geometry import Geometry

    sparse = {name for name, decision in engine.decisions.items() if decision.treatment is Treatment.SPARSE}
    specs = ((name, spec) for stage in engine.specs for name, spec in stage.items() if name in sparse)
    name, spec = next(
        ((name, spec) for name, spec in specs if isinstance(spec, SparseAttentionSpec)), (None, None)
    )
    if name is None:
        return None
    impl = engine.attention[name].impl
    geometry = Geometry(
        impl.num_heads, impl.num_kv_heads, impl.head_size, spec.page_size, impl.scale, soft_cap=impl.soft_cap,
        sink_logits=impl.sink_logits,
    )  # fmt: skip
    return AttentionShape(torch.device(current_platform.device_type), impl.dtype, geometry, impl.cache_dtype)


def find_pays(args, report: Report, engine: DryEngine, config: SparseConfig, shape: AttentionShape) -> None:
    """Measure or forecast from which context it pays."""
    if config.decode_policy == "dense":
        report.pays_unknown = "decode is dense"
        return
    if config.offload is not None:
        report.pays_unknown = "with sparse.offload steps wait for the host; benchmarks time them"
        return
    longest, geometry = engine.vllm_config.model_config.max_model_len, shape.geometry
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest] or [longest]
    if args.measure:
        from vllm_sparse.tools import measure

        found = report.versions
        about = f"one layer on {found['gpu']}, vLLM {found['vllm']}, torch {found['torch']}"
        report.pays = measure.measure(shape, config, contexts, about, measure.graph_us)
        return
    token_bytes = 2 * geometry.kv_heads * geometry.head_dim * shape.kv_dtype.itemsize
    summary, kv = DECODE_POLICIES[config.decode_policy].summary, "fp8" if shape.kv_dtype.itemsize == 1 else "bf16"
    report.pays = forecast(report.versions["gpu"], summary, kv, token_bytes, contexts)
    if report.pays is None:
        report.pays_unknown = (
            f"no committed rows of {config.decode_policy} at several contexts; --measure, on a GPU"
        )


def serve_line(args: argparse.Namespace, sparse: bool) -> str:
    """The command that serves the model as checked, or stock where nothing of it is sparse."""
    given = args.vllm_args
    given = shlex.split(given[0]) if len(given) == 1 and " " in given[0].strip() else given
    words = ["vllm", "serve", args.model]
    if sparse:
        named = any(word.split("=")[0] in ("--attention-backend", "--attention-config", "-ac") for word in given)
        words += [] if named else ["--attention-backend", "sparse"]
        words += [] if args.sparse is None else ["--additional-config", json.dumps({"sparse": args.sparse})]
    return shlex.join([*words, *given])


def text(report: Report) -> list[str]:
    """The report for people."""
    if report.status is Status.REFUSED:
        lines = [f"REFUSED: {report.reason}"]
    else:
        lines = [
            f"{'NOTHING runs sparse' if report.status is Status.NOTHING else 'sparse'}: {report.layers['line']}"
        ]
        if report.layers["linear"]:
            lines.append(f"beside them {report.layers['linear']} Mamba, linear-attention or convolution layers")
        if not report.layers["drafts_listed"]:
            lines.append("layers of drafts, if they have some, are not listed, nor is their memory counted")
        lines += _cache_lines(report.cache)
        if report.pays is None:
            lines.append(f"from which context it pays: unknown: {report.pays_unknown}")
        else:
            first, *others = report.pays.describe(report.layers["sparse"], report.min_context_tokens)
            lines += [f"from which context it pays: {first}", *(f"  {line}" for line in others)]
        lines += [f"kernel {name}: {why or 'can run here'}" for name, why in report.kernels.items()]
    found = report.versions
    supported = "supported" if found["supported"] else f"NOT supported, which are {found['tested']}"
    lines.append(
        f"versions: vLLM {found['vllm']} ({supported}), torch {found['torch']}, "
        f"triton {found['triton'] or 'none'}, GPU {found['gpu'] or 'none'}"
    )
    return [*lines, *(f"set: {each}" for each in report.advice), f"serve: {report.serve}"]


def _cache_lines(found: dict[str, Any]) -> list[str]:
    weights = f"weights of {found['weights_gib']:.2f} GiB a GPU"
    if not found["weights_exact"]:
        weights += ", as if they were not quantised"
    if "unknown" in found:
        return [f"cache: {weights}; {found['unknown']}"]
    how = "estimated" if found["estimated"] else "as given"
    stock = found.get("stock_tokens")
    stock = f"{stock:,} tokens in stock" if stock is not None else f"stock unknown ({found['stock_unknown']})"
    lines = [
        f"cache: {stock}, {found['sparse_tokens']:,} with the sparse backend, in {found['kv_gib']:.2f} GiB "
        f"({how}) of {found['gpu_gib']:g} GiB; {weights}"
    ]
    if not found["fits"]:
        lines.append(f"NOT ENOUGH for one request of {found['max_model_len']:,} tokens: vLLM would not start")
    return lines

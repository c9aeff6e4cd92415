"""`vllm-sparse plan MODEL`: how many tokens of context fit a GPU and a host, before anything is started."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from vllm_sparse.backend import compat
from vllm_sparse.config import MOST, SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.config import HOST_DTYPES, MOST_GIB
from vllm_sparse.offload.sizing import GIB, CacheShape, Split, StepLimits, split_memory
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.support import QUANTISED_CACHES
from vllm_sparse.tools import commands, dry_offload
from vllm_sparse.tools import dry_engine as dry
from vllm_sparse.tools.dry_engine import DryEngine
from vllm_sparse.user_text import shown

MOST_CAPTURED = 512
"""Requests of the largest decode batch that vLLM captures CUDA graphs for by default."""
DEFAULT_CONTEXT = 131072


@dataclass(frozen=True)
class Plan:
    """Tokens of context that one engine holds; ranks of a tensor-parallel engine share each context."""

    kv_gib: float
    """GPU memory of each rank that is left for KV."""
    stock_tokens: int
    resident_tokens: int
    """Tokens that fit with all pages on the GPU, each with its summary."""
    offload: Split | None
    """How offload divides the memory; None where not even one context fits, and ``refusal`` says why."""
    refusal: str
    shape: CacheShape | None
    """None where some layers cannot offload."""

    context_tokens: int
    """Of each request."""

    @property
    def offload_tokens(self) -> int:
        return self.offload.tokens(self.shape, self.context_tokens) if self.offload else 0

    @property
    def hot_share(self) -> float:
        """Share of the head pages of all offloaded tokens that the hot set holds."""
        if not self.offload:
            return 0.0
        slots = self.offload.slots_per_layer * self.shape.layers
        return min(1.0, slots / (self.offload.num_blocks * self.shape.block_head_pages))


def make_plan(
    engine: DryEngine, stock: DryEngine, engine_args: Any, config: SparseConfig, kv_bytes: int, host_bytes: int,
    limits: StepLimits, ranks: int,
) -> Plan:  # fmt: skip
    """Share out ``kv_bytes`` of each rank's GPU and ``host_bytes`` of the host of all ``ranks``.

    Args:
        engine: with its pages on the GPU; ``stock`` without the sparse backend.
        engine_args: of both.
        config: with ``offload``.
    """
    from vllm_sparse.backend import offload

    split, shape, refusal = None, None, ""
    try:
        offloaded = dry_offload.offloaded_of(engine, engine_args, config)
        specs = {name: spec for stage in offloaded.specs for name, spec in stage.items()}
        shape = offload.shape_of(specs, config, offloaded.vllm_config)
        split = split_memory(shape, limits, kv_bytes, host_bytes // ranks, config.offload.hot_fraction)
    except ConfigError as error:
        refusal = str(error)
    return Plan(
        kv_gib=kv_bytes / GIB,
        stock_tokens=stock.tokens(kv_bytes),
        resident_tokens=engine.tokens(kv_bytes),
        offload=split,
        refusal=refusal,
        shape=shape,
        context_tokens=limits.max_context_tokens,
    )


def read_engine(args: argparse.Namespace, config: SparseConfig) -> tuple[DryEngine, DryEngine, Any]:
    """The engine of a directory or hub name with its pages on the GPU, that without the sparse backend, and the
    arguments of both.

    Raises:
        ConfigError: vLLM cannot build it, or the sparse backend does not serve it.
    """
    dry.settle_platform()
    commands.model_config(args)  # refuses ranks by our own name for them
    options = [
        f"--block-size={args.block_size}", f"--dtype={args.dtype}", f"--kv-cache-dtype={args.kv_cache_dtype}",
        f"--tensor-parallel-size={args.tensor_parallel_size}",
        *(["--trust-remote-code"] if args.trust_remote_code else []),
    ]  # fmt: skip
    engine_args = dry.engine_args(args.model, options, {**config.to_mapping(), "offload": None})
    engine = dry.dry_engine(engine_args)
    return engine, dry.stock_of(engine, engine_args), engine_args


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say how much context fits a GPU and a host",
        description="Say how many tokens of context fit, with all pages on the GPU and with sparse.offload.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub name, as for `vllm serve`")
    gib = commands.real(0, MOST_GIB, above=True)
    parser.add_argument("--gpu", type=gib, required=True, help="memory of each GPU, GiB")
    parser.add_argument(
        "--host", type=commands.real(0, MOST_GIB), required=True, help="host memory for K and V, GiB, of all ranks"
    )
    parser.add_argument(
        "--host-dtype", choices=HOST_DTYPES, help="how the host stores them; default: as --sparse says"
    )
    parser.add_argument(
        "--context", type=tokens, help="--max-model-len, such as 128k; default: 128k, or what the model takes"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=commands.real(0, 1, above=True), default=0.9,
    )  # fmt: skip
    parser.add_argument("--kv-gib", type=gib, help="GPU memory for KV as vLLM logs it; default: estimated")
    parser.add_argument("--tensor-parallel-size", type=commands.whole(1, commands.MOST_RANKS), default=1)
    parser.add_argument("--max-num-seqs", type=commands.whole(1, 1 << 20), default=256)
    parser.add_argument("--max-num-batched-tokens", type=commands.whole(1), default=8192)
    parser.add_argument("--block-size", type=commands.whole(PAGE_SIZES[0], MOST), default=PAGE_SIZES[0])
    parser.add_argument("--dtype", default="auto", choices=("auto", "float16", "bfloat16", "float32"))
    commands.add_kv_cache_dtype(parser)
    parser.add_argument("--sparse", type=commands.json_object, default={}, help="sparse settings as JSON")
    parser.add_argument("--trust-remote-code", action="store_true")


def tokens(text: str) -> int:
    """``128k`` as 131,072, ``1m`` as 1,048,576."""
    match = re.fullmatch(r"([0-9]{1,10})([km]?)", text.strip().lower())
    number = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2]] if match else 0
    if not 1 <= number <= MOST:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}; allowed: a number of tokens such as 131072, 128k or 1m, up to {MOST}"
        )
    return number


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ConfigError: an argument that cannot be used, or a model that does not fit the GPU.
    """
    settings = dict(args.sparse)
    if settings.get("offload") is None:
        settings["offload"] = {}
    if args.host_dtype and isinstance(settings["offload"], dict):
        settings["offload"]["host_dtype"] = args.host_dtype
    config = SparseConfig.from_mapping(settings, "--sparse")
    with dry.quiet():
        engine, stock, engine_args = read_engine(args, config)
    ranks, model = args.tensor_parallel_size, engine.vllm_config.model_config
    most = model.max_model_len
    if args.context is None:
        args.context = min(DEFAULT_CONTEXT, most)
    elif args.context > most:
        raise ConfigError(f"--context: {args.context}; allowed for this model: 1 to {most}")
    for one in (engine, stock):
        one.vllm_config.model_config.max_model_len = args.context
    # With the budgets that the engine has read for the heads of its model.
    served = SparseConfig.from_vllm(engine.vllm_config).to_mapping()
    config = SparseConfig.from_mapping({**served, "offload": config.offload.to_mapping()}, "--sparse")
    kv_bytes = dry.kv_bytes(engine, args.gpu, args.gpu_memory_utilization, args.kv_gib)
    page_size = PAGE_SIZES[0] if engine.linear_layers else args.block_size
    max_pages = -(-args.context // page_size) + 1
    limits = StepLimits(
        max_num_reqs=max(args.max_num_seqs, min(2 * args.max_num_seqs, MOST_CAPTURED)),
        max_num_tokens=max(args.max_num_batched_tokens, args.max_num_seqs),
        max_context_tokens=args.context,
        table_pages=min(config.table_pages(page_size), max_pages),
    )
    with dry.quiet():
        plan = make_plan(engine, stock, engine_args, config, kv_bytes, int(args.host * GIB), limits, ranks)
    print_plan(args, engine, plan, limits)


def print_plan(args: argparse.Namespace, engine: DryEngine, plan: Plan, limits: StepLimits) -> None:
    source = "as given" if args.kv_gib is not None else f"with {dry.OVERHEAD_GIB} GiB assumed for the rest"
    layers = f"{len(engine.attention)} layers"
    if engine.linear_layers:
        layers = f"{len(engine.attention)} attention layers beside {engine.linear_layers} of states"
    weights, vllm_config = engine.weight_bytes * args.tensor_parallel_size / GIB, engine.vllm_config
    kv_dtype = compat.kv_dtype(vllm_config)
    kv_dtype = "fp8" if kv_dtype in QUANTISED_CACHES else kv_dtype
    heads = f"{vllm_config.model_config.get_total_num_kv_heads()} KV heads, KV {kv_dtype}"
    print(f"weights              {weights:.2f} GiB, {layers}, {heads}")
    print(f"GPU memory for KV    {plan.kv_gib:.2f} GiB of each of {args.tensor_parallel_size} GPU(s), {source}")
    for name, held in (
        ("stock", plan.stock_tokens),
        ("sparse, resident", plan.resident_tokens),
        ("sparse, offload", plan.offload_tokens),
    ):
        print(f"{name:<20} {held:>12,} tokens: {held // args.context} contexts of {args.context:,}")
    if plan.offload is None:
        print(f"offload does not start: {plan.refusal}")
        return
    shape, split = plan.shape, plan.offload
    ranks = args.tensor_parallel_size
    host = split.num_blocks * shape.host_block_bytes * ranks / GIB
    print(
        f"with offload         {host:.2f} GiB of the host hold K and V{' in fp8' if shape.in_fp8 else ''}; "
        f"each GPU holds "
        f"{split.num_blocks * shape.gpu_block_bytes / GIB:.2f} GiB of summaries"
        f"{' and states' if shape.states else ''}, "
        f"{split.slots_per_layer * shape.layers * shape.slot_bytes / GIB:.2f} GiB of hot head pages "
        f"({100 * plan.hot_share:.1f}% of all), {limits.fixed_bytes(shape) / GIB:.2f} GiB of buffers"
    )
    if shape.states:
        print(
            f"blocks               {shape.block_tokens:,} tokens; in each context {shape.states.request_blocks} "
            f"more are held by states, whose part of the host lies idle"
        )
    if (split.num_blocks + 1) * shape.host_block_bytes <= int(args.host * GIB) // ranks:
        print(f"the GPU cannot index more: {args.host - host:.2f} GiB of --host stay unused")

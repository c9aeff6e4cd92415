"""`vllm-sparse plan MODEL`: how many tokens of context fit a GPU and a host, before anything is started."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from vllm_sparse.config import MOST, SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.config import HOST_DTYPES, MOST_GIB
from vllm_sparse.offload.sizing import GIB, CacheShape, Split, StepLimits, split_memory
from vllm_sparse.support import QUANTISED_CACHES
from vllm_sparse.tools import commands
from vllm_sparse.user_text import shown

OVERHEAD_GIB = 2.25
"""Activations, CUDA graphs and workspaces of one GPU where vLLM has not measured them yet."""
MOST_CAPTURED = 512
"""Requests of the largest decode batch that vLLM captures CUDA graphs for by default."""
DEFAULT_CONTEXT = 131072
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""Names under which configurations say how long a context the model takes, as vLLM looks for them."""


@dataclass(frozen=True)
class Model:
    """Shape and size of a model, as far as a plan needs them."""

    layers: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    """Of a number of the KV cache."""
    weight_bytes: int
    most_tokens: int | None = None
    """The longest context; None where the configuration does not say."""


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
    shape: CacheShape

    @property
    def offload_tokens(self) -> int:
        return self.offload.tokens(self.shape.page_size) if self.offload else 0

    @property
    def hot_share(self) -> float:
        """Share of the head pages of all offloaded tokens that the hot set holds."""
        if not self.offload:
            return 0.0
        return min(1.0, self.offload.slots_per_layer / (self.offload.num_blocks * self.shape.kv_heads))


def make_plan(
    model: Model,
    config: SparseConfig,
    kv_bytes: int,
    host_bytes: int,
    limits: StepLimits,
    page_size: int,
    summary_slots: int,
    ranks: int = 1,
) -> Plan:
    """Share out ``kv_bytes`` of each rank's GPU and ``host_bytes`` of the host of all ``ranks``."""
    heads = max(1, model.kv_heads // ranks)
    hot_fraction, host_dtype = "auto", "auto"
    if config.offload is not None:
        hot_fraction, host_dtype = config.offload.hot_fraction, config.offload.host_dtype
    shape = CacheShape(
        model.layers, heads, model.head_dim, page_size, model.item_bytes, max(1, summary_slots), host_dtype
    )
    token_bytes = model.layers * heads * shape.token_bytes
    split, refusal = None, ""
    try:
        split = split_memory(shape, limits, kv_bytes, host_bytes // ranks, hot_fraction)
    except ConfigError as error:
        refusal = str(error)
    return Plan(
        kv_gib=kv_bytes / GIB,
        stock_tokens=kv_bytes // (token_bytes * page_size) * page_size,
        resident_tokens=kv_bytes // (token_bytes * (page_size + summary_slots)) * page_size,
        offload=split,
        refusal=refusal,
        shape=shape,
    )


def read_model(args: argparse.Namespace) -> Model:
    """Shape and size of a directory or hub name, from its configuration alone.

    Raises:
        ConfigError: there is none, or it is not of a decoder whose layers are all alike.
    """
    import torch
    import transformers

    name, dtype, trust_remote_code = args.model, args.dtype, args.trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of Transformers, the hub, or the model's own code
        raise commands.unusable_model(args, error, "has no configuration that can be read") from error
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    heads = getattr(text, "num_attention_heads", None)
    if kinds != {"full_attention"} or heads is None:
        raise ConfigError(
            f"MODEL: {name!r} has layers of kinds {', '.join(sorted(kinds))}; allowed: full_attention"
        )
    kept = (torch.float32 if dtype == "float32" else torch.float16).itemsize
    if dtype == "auto" and config.dtype == torch.float32:
        kept = torch.float16.itemsize  # vLLM serves checkpoints of float32 in 16 bits
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Model(
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        item_bytes=1 if args.kv_cache_dtype in QUANTISED_CACHES else kept,
        weight_bytes=parameters * kept,
        most_tokens=_most_tokens(text),
    )


def _most_tokens(text) -> int | None:
    """The longest context of a model, as vLLM derives it."""
    lengths = [length for name in LENGTHS if type(length := getattr(text, name, None)) is int]
    if not lengths:
        return None
    most = min(lengths)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1
    if kind in ("yarn", "deepseek_yarn"):
        return max(most, int(factor * (rope.get("original_max_position_embeddings") or 0)))
    return most if kind in (None, "su", "longrope", "llama3", "default") else int(factor * most)


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
    parser.add_argument("--block-size", type=commands.whole(), default=16)
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
    config.check_page_size(args.block_size)
    model, ranks = read_model(args), args.tensor_parallel_size
    if ranks < 1 or (model.kv_heads % ranks and ranks % model.kv_heads):
        raise ConfigError(f"--tensor-parallel-size: {ranks} does not divide {model.kv_heads} KV heads")
    most = model.most_tokens
    if args.context is None:
        args.context = min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
    elif most is not None and args.context > most:
        raise ConfigError(f"--context: {args.context}; allowed for this model: 1 to {most}")
    if args.kv_gib is not None and args.kv_gib > args.gpu:
        raise ConfigError(f"--kv-gib: {args.kv_gib:g} of --gpu {args.gpu:g}; allowed: up to {args.gpu:g}")
    config = config.with_budgets(args.model, model.layers, model.kv_heads)
    usable = args.gpu * args.gpu_memory_utilization
    kv_gib = args.kv_gib
    if kv_gib is None:
        kv_gib = usable - model.weight_bytes / ranks / GIB - OVERHEAD_GIB
    if kv_gib <= 0:
        raise ConfigError(
            f"--gpu: of {args.gpu:g} GiB, {usable:.2f} may be used, and the weights take "
            f"{model.weight_bytes / ranks / GIB:.2f} of each rank; nothing is left for KV"
        )
    max_pages = -(-args.context // args.block_size) + 1
    limits = StepLimits(
        max_num_reqs=max(args.max_num_seqs, min(2 * args.max_num_seqs, MOST_CAPTURED)),
        max_num_tokens=max(args.max_num_batched_tokens, args.max_num_seqs),
        max_context_tokens=args.context,
        table_pages=min(config.table_pages(args.block_size), max_pages),
    )
    kv_bytes, host_bytes, rows = int(kv_gib * GIB), int(args.host * GIB), rows_of(config, model, args.block_size)
    plan = make_plan(model, config, kv_bytes, host_bytes, limits, args.block_size, rows, ranks)
    print_plan(args, model, plan, limits)


def rows_of(config: SparseConfig, model: Model, page_size: int) -> int:
    """Summary slots of a page."""
    from vllm_sparse.pages.summaries import summary_slots
    from vllm_sparse.policies import DECODE_POLICIES

    summary = DECODE_POLICIES[config.decode_policy].summary
    return summary_slots(summary, page_size, model.head_dim, model.item_bytes)


def print_plan(args: argparse.Namespace, model: Model, plan: Plan, limits: StepLimits) -> None:
    source = "as given" if args.kv_gib is not None else f"with {OVERHEAD_GIB} GiB assumed for the rest"
    weights = f"{model.weight_bytes / GIB:.2f} GiB"
    print(f"weights              {weights}, {model.layers} layers, {model.kv_heads} KV heads")
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
    host = split.num_blocks * shape.host_page_bytes * ranks / GIB
    print(
        f"with offload         {host:.2f} GiB of the host hold K and V{' in fp8' if shape.in_fp8 else ''}; "
        f"each GPU holds "
        f"{split.num_blocks * shape.gpu_block_bytes / GIB:.2f} GiB of summaries, "
        f"{split.slots_per_layer * shape.layers * shape.slot_bytes / GIB:.2f} GiB of hot head pages "
        f"({100 * plan.hot_share:.1f}% of all), {limits.fixed_bytes(shape) / GIB:.2f} GiB of buffers"
    )
    narrow = split.num_blocks * shape.host_page_bytes * ranks < 0.99 * args.host * GIB
    if narrow:
        print(f"the GPU cannot index more: {args.host - host:.2f} GiB of --host stay unused")

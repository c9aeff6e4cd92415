"""`vllm-sparse tune MODEL`: arguments, engine, passages, and what an interrupted run leaves."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vllm_sparse
from vllm_sparse import model_files
from vllm_sparse.backend.model_config import query_heads
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode import budgets
from vllm_sparse.errors import ConfigError, TextError
from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.prefill import patterns
from vllm_sparse.tools import commands
from vllm_sparse.tools.tune.budgets import LARGEST_SHARE, PageMasses
from vllm_sparse.tools.tune.search import CANDIDATES, Measurement
from vllm_sparse.user_text import read_json

DEFAULT_TOKENS, DEFAULT_CHUNK = 32768, 8192
DEFAULT_TOLERANCE = 0.05


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="find the prefill pattern of each query head of a model, or the decode budget of each KV head",
        description="Find the prefill pattern of each query head of a model, on a sample text, and leave them "
        "where prefill_policy=vertical_slash looks for them; or, with --decode, the share of budget_tokens of "
        "each KV head, where head_budgets=auto looks for it. An interrupted run continues when it is repeated.",
    )
    parser.set_defaults(run=run)
    commands.add_model_options(parser)
    whole, real = commands.whole, commands.real

    def option(name: str, kind: Callable, about: str, **more) -> None:
        parser.add_argument(name, type=kind, help=about, **more)

    option("--tokens", whole(1), "tokens of a passage; default: 32768, or what the model takes")
    option("--passages", whole(1), "slices of the text that are measured", default=4)
    option("--tolerance", real(), "relative error of a head's output; default: 0.05")
    parser.add_argument(
        "--decode", action="store_true", help="find budgets, on the half of the text that eval spares"
    )
    option("--budget-tokens", whole(1), "their mean; default: 2048, or a quarter of a passage")
    option("--dense-layers", whole(), "first layers that have none; default: 2, as served")
    option("--out", Path, "default: where serving looks for this model's file")
    option("--chunk", whole(1), "tokens of a step, best as served; default: 8192")
    option("--min-prefill-tokens", whole(), "contexts from here on count; default: as served")


def run(args: argparse.Namespace) -> None:
    """Measure what was not measured before, then write the file and print what it gains.

    Raises:
        ConfigError: an argument that cannot be used; names it, its value and what is allowed.
    """
    for name in ("tolerance",) if args.decode else ("budget_tokens", "dense_layers"):
        if getattr(args, name) is not None:
            option, where = f"--{name.replace('_', '-')}", "without" if args.decode else "with"
            raise ConfigError(f"{option}: {getattr(args, name)}; allowed {where} --decode only")
    if args.tolerance is None:
        args.tolerance = DEFAULT_TOLERANCE
    commands.stay_in_process()
    text = commands.sample_text(args.text)
    if args.decode:
        text = commands.half_of(text, "dev")
    model = commands.model_config(args)
    num_layers = model.hf_text_config.num_hidden_layers
    if args.decode and not 0 <= (args.dense_layers or 0) < num_layers:
        raise ConfigError(f"--dense-layers: {args.dense_layers}; allowed for this model: 0 to {num_layers - 1}")
    settings = _settings(args, model.max_model_len, text)
    out = args.out or (budgets if args.decode else patterns).default_path(args.model)
    commands.check_writable(out)
    commands.check_writable(_partial_path(out))
    samples = _passages(commands.tokenizer(args, model), text, settings)
    found = {"weights": model_files.weights_digest(args.model)}
    found |= {"vllm_sparse": vllm_sparse.__version__, "sample_tokens": args.passages * settings["tokens"]}
    find = _find_budgets if args.decode else _find_patterns
    find(args, settings, samples, model, out, {"model": args.model, "settings": settings, **found})


def _find_patterns(args: argparse.Namespace, settings: dict, samples: list, model, out: Path, about: dict) -> None:
    num_layers, q_heads = model.hf_text_config.num_hidden_layers, query_heads(model.hf_text_config)
    candidates = [asdict(candidate) for candidate in CANDIDATES]
    of = {"model": args.model, "weights": about["weights"], "num_layers": num_layers, "q_heads": q_heads}
    partial = Partial(_partial_path(out), {**of, **settings, "candidates": candidates})
    _measure(args, settings, ("tune_start", candidates), "causal_pairs", samples, partial)
    found = Measurement.total([Measurement.of_workers(p, q_heads) for p in partial.passages])
    choices = found.choose(args.tolerance)
    patterns.write(out, found.table(choices, num_layers), q_heads, **about, tolerance=args.tolerance)
    partial.path.unlink()
    _print_summary(found, choices, args.tolerance, out)


def _find_budgets(args: argparse.Namespace, settings: dict, samples: list, model, out: Path, about: dict) -> None:
    num_layers, kv_heads = model.hf_text_config.num_hidden_layers, model.get_total_num_kv_heads()
    of = {"model": args.model, "weights": about["weights"], "num_layers": num_layers, "kv_heads": kv_heads}
    partial = Partial(_partial_path(out), {**of, **settings})
    most_tokens = int(LARGEST_SHARE * settings["budget_tokens"])
    _measure(args, settings, ("tune_start_decode", most_tokens), "queries", samples, partial)
    served = SparseConfig()
    dense_layers = served.dense_layers if args.dense_layers is None else args.dense_layers
    found = PageMasses.of_passages(partial.passages, kv_heads).from_layer(dense_layers)
    if not found.layers:
        raise ConfigError(f"--dense-layers: {dense_layers} leaves no layer that runs sparse; allowed: fewer")
    budget_pages = settings["budget_tokens"] // found.page_size
    pages = found.choose(budget_pages, served.least_pages(found.page_size))
    budgets.write(out, found.table(pages, num_layers), kv_heads, **about, page_size=found.page_size)
    partial.path.unlink()
    _print_budgets(found, pages, budget_pages, out)


def _partial_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _settings(args: argparse.Namespace, max_model_len: int, text: str) -> dict[str, Any]:
    """Arguments that a measurement depends on, beside the model."""
    most = max_model_len - 1
    tokens = min(DEFAULT_TOKENS, most) if args.tokens is None else args.tokens
    served = SparseConfig()
    # A sample shorter than what is sparse by default would measure nothing.
    shortest = min(served.min_prefill_tokens, tokens // 4)
    page_size = args.block_size or PAGE_SIZES[0]
    served.check_page_size(page_size)
    settings = {
        "tokens": tokens,
        "passages": args.passages,
        "chunk": min(DEFAULT_CHUNK, tokens) if args.chunk is None else args.chunk,
        "min_prefill_tokens": shortest if args.min_prefill_tokens is None else args.min_prefill_tokens,
        "sink_tokens": served.sink_tokens,
        "window_tokens": served.window_tokens,
        "block_size": args.block_size,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    limits = [("tokens", 256, most), ("chunk", 256, tokens), ("min_prefill_tokens", 0, tokens - 1)]
    if args.decode:
        budget = min(served.budget_tokens, tokens // 4) if args.budget_tokens is None else args.budget_tokens
        settings["budget_tokens"] = budget
        largest = int((tokens - 1) // LARGEST_SHARE)
        limits.append(("budget_tokens", served.least_pages(page_size) * page_size, largest))
    for option, least, limit in limits:
        if not least <= settings[option] <= limit:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name}: {settings[option]}; allowed for this model: {least} to {limit}")
    return settings


class Partial:
    """Passages that were measured, on disk: each is there as soon as it is finished."""

    def __init__(self, path: Path, arguments: dict):
        self.path, self.arguments, self.passages = path, arguments, []
        if not path.exists():
            return
        try:
            before = read_json(path)
            other = [key for key, value in arguments.items() if before["arguments"].get(key) != value]
            passages = list(before["passages"])
        except (TextError, KeyError, AttributeError, TypeError):
            other = ["contents that are no measurement"]
        if other:
            print(f"{path} was measured with another {', '.join(other)}: starting afresh", flush=True)
            return
        self.passages = passages
        print(f"{path} holds {len(passages)} measured passages: continuing there", flush=True)

    def add(self, workers: list[dict]) -> None:
        """Add what each of ``workers`` measured of the next passage."""
        self.passages.append(workers)
        model_files.write_json(self.path, {"arguments": self.arguments, "passages": self.passages})


def _measure(
    args: argparse.Namespace, settings: dict, start: tuple, counted: str, samples: list, partial: Partial
) -> None:
    """Measure the passages that ``partial`` lacks.

    Args:
        start: the method of :class:`vllm_sparse.tools.tune.worker.TuneWorker` to call first, and its argument.
        counted: what a layer that was measured has a number of.
        samples: tokens of each passage.
    """
    if len(partial.passages) >= settings["passages"]:
        return
    from vllm_sparse.tools.demo.packages import progress

    with _engine(args, settings) as llm:
        llm.collective_rpc(start[0], args=start[1:])
        chunks = -(-settings["tokens"] // settings["chunk"])
        done = len(partial.passages)
        with progress("measuring", chunks * len(samples), initial=chunks * done, unit="chunk") as bar:
            for number in range(done, len(samples)):
                _prefill(llm, samples[number], number, bar, chunks)
                workers = llm.collective_rpc("tune_take")
                if not any(sums[counted] for worker in workers for sums in worker["layers"].values()):
                    raise ConfigError(
                        f"{args.model}: no chunk of this model ran sparse; the log says why. Allowed: models with "
                        f"full-attention layers, --tokens and --chunk that leave chunks past --min-prefill-tokens"
                    )
                partial.add(workers)


@contextmanager
def _engine(args: argparse.Namespace, settings: dict) -> Iterator[Any]:
    sparse = {
        "prefill_policy": "vertical_slash", "head_patterns": "none", "decode_policy": "dense", "dense_layers": 0,
        **{name: settings[name] for name in ("min_prefill_tokens", "sink_tokens", "window_tokens")},
    }  # fmt: skip
    llm = commands.start_engine(
        args, additional_config={"sparse": sparse}, max_model_len=settings["tokens"] + 1,
        max_num_batched_tokens=settings["chunk"], max_num_seqs=1, enable_prefix_caching=False, enforce_eager=True,
        # What is compared with the dense output lies beside vLLM's cache.
        gpu_memory_utilization=0.8, worker_extension_cls="vllm_sparse.tools.tune.worker.TuneWorker",
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _passages(tokenizer, text: str, settings: dict) -> list[list[int]]:
    """Slices of the text, from its beginning to its end, each begun as the tokenizer begins a text."""
    start = tokenizer.encode("")
    body = tokenizer.encode(text, add_special_tokens=False)
    length, count = settings["tokens"] - len(start), settings["passages"]
    spare = len(body) - length
    if spare < count - 1:
        raise ConfigError(
            f"--text: {len(body)} tokens are too few for {count} different passages of {length}; allowed: a "
            f"longer text, less --tokens, fewer --passages"
        )
    places = [spare * number // max(1, count - 1) for number in range(count)]
    return [start + body[place : place + length] for place in places]


def _prefill(llm, tokens: list[int], number: int, bar, chunks: int) -> None:
    from vllm import SamplingParams

    engine, end = llm.llm_engine, bar.n + chunks
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    engine.add_request(f"passage-{number}", {"prompt_token_ids": tokens}, params)
    while engine.has_unfinished_requests():
        engine.step()
        bar.update(min(1, end - bar.n))
    bar.update(end - bar.n)


def _print_budgets(found: PageMasses, pages, budget_pages: int, out: Path) -> None:
    print(f"\n{'tokens of a head':16} {'least':>6} {'mean':>6} {'most':>6}   held by best pages: mean, least head")
    for name, chosen in (("the same", pages.new_full(pages.shape, budget_pages)), ("tuned", pages)):
        sizes = (chosen.min().item(), chosen.double().mean().item(), chosen.max().item())
        least, mean, most = (f"{size * found.page_size:6.0f}" for size in sizes)
        held = found.held(chosen)
        print(f"{name:16} {least} {mean} {most}   {held.mean():.4f} {held.min():.4f}")
    print(f"\nOf layers {found.layers[0]} to {found.layers[-1]}, on the text that budgets were chosen on.")
    print(f"Budgets are in {out}")


def _print_summary(found: Measurement, choices, tolerance: float, out: Path) -> None:
    dense_layers = SparseConfig().dense_layers
    chosen = Counter(
        choice
        for layer, row in zip(found.layers, choices.tolist(), strict=True)
        if layer >= dense_layers
        for choice in row
    )
    print(f"\n{'pattern':48} heads")
    for index, candidate in enumerate(CANDIDATES):
        print(f"{_describe(candidate):48} {chosen[index]:5}")
    print(f"\n{'':24} density   error  heads over {tolerance:g}")
    for name, picked in (("all with the first", choices.new_zeros(choices.shape)), ("tuned", choices)):
        cost = found.cost(picked, dense_layers, tolerance)
        print(f"{name:24} {cost.density:7.3f} {cost.error:7.4f}  {cost.heads_over} of {cost.heads}")
    print(f"\nWithout the first {dense_layers} layers, which are dense unless dense_layers says otherwise.")
    print(f"Patterns are in {out}")


def _describe(pattern: HeadPattern) -> str:
    named = {
        "top_p": pattern.top_p,
        "vertical": pattern.vertical_tokens,
        "slash": pattern.slash_tokens,
        "recent": pattern.recent_tokens,
    }
    return ", ".join(f"{name} {value}" for name, value in named.items() if value)

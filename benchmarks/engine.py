"""Time the real vLLM engine, stock against sparse, in fresh processes on the same GPU.

    python -m benchmarks.engine --model MODEL 1q1s8k 1q1s128k 8q1s32k
    python -m benchmarks.engine --tp 2 --executor ray --shape llama-70b --layers 40 1q1s128k
    python -m benchmarks.engine --weights fp8 --kv-cache-dtype fp8,auto 1q1s128k 8q1s32k 3q1s128k 6q1s128k
    python -m benchmarks.engine --kv-cache-dtype fp8 --drafts 0,3 1q1s128k 8q1s32k 3q1s128k
    python -m benchmarks.engine --shape qwen3.5-27b --engine-args '{"gdn_prefill_backend": "triton"}' 1q1s128k
    python -m benchmarks.engine --weights fp8 --kv-cache-dtype fp8,auto --tokens 33 --sparse '{"prefill_policy":
        "vertical_slash", "prefill_top_p": 0, "slash_tokens": 512}' 1q1s128k

Without ``--model``, random weights in the shape of ``--shape``. TPOT is the median time between output tokens of
all running requests; TTFT the time to the first token of the batch. With drafts, of n-grams, it is that of a
step which verifies them, and all of them are rejected: how many are right is the text's affair, the same for
both sides. Each KV cache dtype and number of drafts is measured in a stock engine and in a sparse one for each
``--sparse``; rows are written after each sparse engine, so that a command cut short leaves those of the engines
before, and the table comes last. Where several engines fit a GPU, ``--together`` starts them at once and
measures one after the other, which takes a fraction of the time; each is then given its KV cache:

    python -m benchmarks.engine --together --gpu-memory 0.2 --kv-gib 26 --drafts 0,3 1q1s8k 1q1s128k

With ``--decode-only`` prompts are not computed: contexts are random keys and values, written by each engine's own
backend, and there is no TTFT.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.batch_spec import max_num_seqs, parse
from benchmarks.shapes import SHAPES, model_of, shape_name
from benchmarks.workers import Worker, report, wait_for_turn

KV_CACHE_DTYPES = ("auto", "fp8")
LEAST_CHUNK = 2048
"""Fewest prompt tokens of a step by vLLM's defaults."""
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Dtypes of vLLM's as rows name them."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["1q1s8k", "1q1s32k", "1q1s128k", "8q1s32k"])
    parser.add_argument("--model", default="", help="a model directory or name; default: random weights")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="of random weights")
    parser.add_argument("--layers", type=int, help="of random weights; fewer hold longer contexts")
    parser.add_argument("--sparse", action="append", help="sparse settings as JSON; again for one more engine")
    parser.add_argument("--baseline", default="FLASH_ATTN", help="stock attention backend; '' skips it")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto, fp8, or auto,fp8")
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16", help="fp8: quantised when loaded")
    parser.add_argument("--drafts", default="0", help="that each request has in a step, or several, as 0,3")
    parser.add_argument("--tokens", type=int, default=65, help="in which all requests of a batch decode")
    parser.add_argument("--tp", type=int, default=1, help="GPUs, for both backends")
    parser.add_argument("--executor", choices=("mp", "ray"), help="for --tp above 1; default: mp")
    parser.add_argument("--gpu-memory", type=float, default=0.9)
    parser.add_argument("--together", action="store_true", help="start all engines at once; see above")
    parser.add_argument("--kv-gib", type=float, help="KV cache of each engine, whatever --gpu-memory")
    parser.add_argument("--decode-only", action="store_true", help="random keys and values instead of prefill")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="of both engines: LLM's, as JSON")
    parser.add_argument("--limit", type=float, default=600, help="seconds of an engine, after which it is killed")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--worker", type=lambda text: Side(*json.loads(text)), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sparse = args.sparse or ["{}"]
    args.kv_cache_dtype = args.kv_cache_dtype.split(",")
    try:
        args.drafts = [int(number) for number in args.drafts.split(",")]
    except ValueError:
        parser.error(f"--drafts: {args.drafts!r}; allowed: whole numbers with commas between them")
    for dtype in args.kv_cache_dtype:
        if dtype not in KV_CACHE_DTYPES:
            parser.error(f"--kv-cache-dtype: {dtype!r}; allowed: {', '.join(KV_CACHE_DTYPES)}")
    if args.tp > 1:
        args.executor = args.executor or "mp"
    elif args.executor:
        parser.error("--executor is for --tp above 1")
    return args


@dataclass(frozen=True)
class Side:
    """An engine to measure."""

    backend: str
    kv_cache_dtype: str
    drafts: int = 0
    settings: str = ""
    """Of sparse attention, as JSON."""

    @property
    def is_sparse(self) -> bool:
        return self.backend == "sparse"


def sides_of(args) -> list[Side]:
    """Engines to measure, each stock one before the sparse ones that are held against it."""
    sides = []
    for dtype, drafts in itertools.product(args.kv_cache_dtype, args.drafts):
        sides += [Side(args.baseline, dtype, drafts)] if args.baseline else []
        sides += [Side("sparse", dtype, drafts, settings) for settings in args.sparse]
    return sides


def main() -> None:
    args = parse_args()
    if args.worker:
        for found in measure(args, args.worker):
            report(found)
        return
    # A plain SIGTERM would skip what ends the engine and prints what was measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    sides: dict[Side, dict] = {}
    try:
        for side, found in run(args, sides_of(args)):
            sides[side] = found
            if side.is_sparse:
                stock = sides.get(Side(args.baseline, side.kv_cache_dtype, side.drafts), {})
                results.append("engine", rows_of(args, side, found, stock), args.out)
    finally:
        print_table(args, sides)
    if any("reason" in found for found in sides.values()):
        raise SystemExit("not every engine ran to its end")


def rows_of(args, side: Side, sparse: dict, stock: dict) -> list[dict]:
    """A row for each batch and metric; none of a batch that one of the two engines did not run."""
    rows, settings = [], json.loads(side.settings)
    for spec in args.specs:
        ours, theirs = sparse.get(spec, {}), stock.get(spec, {})
        if "tpot_ms" not in ours or (args.baseline and "tpot_ms" not in theirs):
            continue
        for bench in ("tpot",) if args.decode_only else ("tpot", "ttft"):
            # A step that verifies drafts gives as many tokens as are right: its time is none of a token.
            name = "verification" if side.drafts and bench == "tpot" else bench
            baseline = theirs.get(f"{bench}_ms")
            rows.append(
                sparse["environment"]
                | {
                    "bench": name, "shape": args.model or shape_name(args.shape, args.layers), "mode": "resident",
                    "tp": args.tp, "executor": args.executor,
                    "batch": len(parse(spec)), "context": max(r.context_tokens for r in parse(spec)),
                    "batch_spec": spec, "budget": sparse["budget"], "policy": sparse["policy"],
                    "prefill_policy": sparse["prefill_policy"], "prefill_density": ours["prefill_density"],
                    "sparse": settings, "baseline": args.baseline, "eager": args.eager,
                    "engine_args": args.engine_args, "decode_only": args.decode_only,
                    "kv_dtype": sparse["kv_dtype"], "baseline_kv_dtype": stock.get("kv_dtype"),
                    "weights": sparse["weights"], "drafts": side.drafts, "default": not settings,
                    "baseline_ms": baseline, "sparse_ms": ours[f"{bench}_ms"],
                    "p99_baseline_ms": theirs.get("p99_ms"), "p99_sparse_ms": ours["p99_ms"],
                    "speedup": round(baseline / ours[f"{bench}_ms"], 3) if baseline else None,
                    "kv_tokens": None if args.kv_gib else sparse["kv_tokens"],
                    "baseline_kv_tokens": None if args.kv_gib else stock.get("kv_tokens"),
                    "start_baseline_s": stock.get("start_s"), "start_sparse_s": sparse["start_s"],
                    "free_baseline_gib": stock.get("free_gib"), "free_sparse_gib": sparse.get("free_gib"),
                }
            )  # fmt: skip
    return rows


def print_table(args, sides: dict[Side, dict]) -> None:
    """Milliseconds of a decode step and seconds to the first tokens; below, how many times faster sparse is."""

    def name(side: Side) -> str:
        number = f" {1 + args.sparse.index(side.settings)}" if side.is_sparse and len(args.sparse) > 1 else ""
        dtype = sides[side].get("kv_dtype", side.kv_cache_dtype)
        drafts = f", {side.drafts} drafts" if side.drafts else ""
        return f"{'sparse' if side.is_sparse else 'stock'}{number}, {dtype}{drafts}"

    def line(title: str, facts: list, cells: list[str]) -> None:
        shown = "".join(f"{'' if fact is None else fact:>11{',' if type(fact) is int else ''}}" for fact in facts)
        print(f"{title:32}{shown:33}" + "".join(f"{cell:>20}" for cell in cells))

    for number, settings in enumerate(args.sparse, 1):
        if settings != "{}":
            print(f"sparse{f' {number}' if len(args.sparse) > 1 else ''}: {settings}")
    line("KV cache", ["tokens", "start s", "free GiB"], [f"{spec} ms, s" for spec in args.specs])
    for side, found in sides.items():
        times = [found.get(spec, {}) for spec in args.specs]
        cells = [f"{t['tpot_ms']:.3f} {t['ttft_ms'] / 1e3:6.2f}" if "tpot_ms" in t else "-" for t in times]
        line(name(side), [found.get(fact) for fact in ("kv_tokens", "start_s", "free_gib")], cells)
    for side in sides:
        others = [
            Side(args.baseline, side.kv_cache_dtype, side.drafts),
            Side("sparse", "auto", side.drafts, side.settings),
            Side("sparse", side.kv_cache_dtype, 0, side.settings),
        ]  # fmt: skip
        for other in others if side.is_sparse else ():
            if other in sides and other != side:
                pairs = [(sides[side].get(spec, {}), sides[other].get(spec, {})) for spec in args.specs]
                ratios = [
                    f"{theirs['tpot_ms'] / ours['tpot_ms']:.2f}x {theirs['ttft_ms'] / ours['ttft_ms']:5.2f}x"
                    if "tpot_ms" in ours and "tpot_ms" in theirs else "-"
                    for ours, theirs in pairs
                ]  # fmt: skip
                line(f"{name(side)} against {name(other)}", [], ratios)
    for side, found in sides.items():
        reasons = {spec: found[spec]["reason"] for spec in args.specs if "reason" in found.get(spec, {})}
        for what, reason in [*reasons.items(), *([("engine", found["reason"])] if "reason" in found else [])]:
            print(f"{name(side)}: {what}: {reason}")


def run(args, sides: list[Side]) -> Iterator[tuple[Side, dict]]:
    """What was found of each side, in their order: one after the other, or all started first."""

    def start(side: Side) -> Worker:
        worker = json.dumps([side.backend, side.kv_cache_dtype, side.drafts, side.settings])
        return Worker([sys.executable, "-m", "benchmarks.engine", *sys.argv[1:], "--worker", worker], args.limit)

    if not args.together:
        for side in sides:
            with start(side) as worker:
                yield side, worker.measure()
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(start(side)) for side in sides]
        for worker in workers:
            worker.wait_until_ready()
        for side, worker in zip(sides, workers, strict=True):
            yield side, worker.measure()


def measure(args, side: Side) -> Iterator[dict]:
    """What is known of an engine, and the times of each batch, as soon as they are."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from vllm import LLM, SamplingParams

    batches = {spec: parse(spec) for spec in args.specs}
    longest = max(r.context_tokens for batch in batches.values() for r in batch)

    def steps(batch, chunk: int) -> int:
        return args.tokens + (0 if args.decode_only else prefill_steps(batch, chunk))

    more = max(steps(batch, LEAST_CHUNK) for batch in batches.values())
    memory = {"kv_cache_memory_bytes": int(args.kv_gib * 2**30)} if args.kv_gib else {}
    model, load_format = args.model, "auto"
    if not model:
        model, load_format = str(model_of(args.shape, args.layers)), "dummy"
    settings = json.loads(side.settings or "{}")
    start = time.perf_counter()
    llm = LLM(
        model, load_format=load_format, skip_tokenizer_init=True, attention_backend=side.backend,
        max_model_len=longest + max(256, more), max_num_seqs=max_num_seqs(batches.values()),
        gpu_memory_utilization=args.gpu_memory, enable_prefix_caching=False,
        disable_log_stats=not side.drafts,
        enforce_eager=args.eager, tensor_parallel_size=args.tp, kv_cache_dtype=side.kv_cache_dtype,
        quantization="fp8" if args.weights == "fp8" else None, distributed_executor_backend=args.executor,
        additional_config={"sparse": settings} if side.is_sparse else {},
        speculative_config=speculative_config(side.drafts),
        **memory, **without_prefill(args, side), **args.engine_args,
    )  # fmt: skip
    if args.decode_only:
        llm.collective_rpc("fill_new_requests")
    yield {"start_s": round(time.perf_counter() - start, 1), **about(llm.llm_engine.vllm_config)}
    if side.is_sparse:
        from vllm_sparse.config import SparseConfig

        config = SparseConfig.from_mapping(settings, "--sparse")
        yield {
            "budget": config.budget_tokens, "policy": config.decode_policy,
            "prefill_policy": config.prefill_policy, "environment": results.environment(),
        }  # fmt: skip
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    wait_for_turn()
    pairs = prefill_pairs(llm) if side.is_sparse else (0, 0)
    for spec, batch in batches.items():
        tokens = steps(batch, scheduler.max_num_batched_tokens)
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        before = drafted(llm)
        found = time_batch(llm.llm_engine, batch, params, args.tokens // 2)
        if side.drafts and "steps" in found and drafted(llm) - before < 0.9 * found["steps"] * len(batch):
            found = {"reason": "steps without drafts: the proposer had none for every request"}
        if side.is_sparse and "reason" not in found:
            before, pairs = pairs, prefill_pairs(llm)
            attended, causal = pairs[0] - before[0], pairs[1] - before[1]
            found["prefill_density"] = round(attended / causal, 4) if causal else None
        print(side.backend, side.kv_cache_dtype, spec, found, file=sys.stderr, flush=True)
        yield {spec: found}
    import torch

    if torch.cuda.is_available():
        yield {"free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 2)}
    llm.llm_engine.engine_core.shutdown()


def prefill_steps(batch, chunk: int) -> int:
    """Steps of ``chunk`` tokens that the prompts of a batch take: the first request decodes in most of them."""
    return -(-sum(request.context_tokens for request in batch) // chunk)


def speculative_config(drafts: int) -> dict | None:
    """N-grams, which cost next to nothing, and a verification that finds all of them wrong."""
    if not drafts:
        return None
    return {
        "method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 2,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.0] * drafts,
    }  # fmt: skip


def without_prefill(args, side: Side) -> dict:
    """What an engine is given for ``--decode-only``."""
    if not args.decode_only:
        return {}
    # vLLM does not schedule a step ahead where it looks up n-grams on the host.
    scheduler = "DecodeOnlyScheduler" if side.drafts else "DecodeOnlyAsyncScheduler"
    return {
        "scheduler_cls": f"benchmarks.decode_only.{scheduler}",
        "worker_extension_cls": "benchmarks.decode_only.FillWorker",
    }


def drafted(llm) -> int:
    """Times that a request had drafts to verify, so far."""
    if llm.llm_engine.vllm_config.speculative_config is None:
        return 0
    counts = (metric for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_drafts")
    return sum(metric.value for metric in counts)


def about(config: Any) -> dict:
    """Dtypes of an engine, by its config, and the tokens that its KV cache holds."""
    from vllm_sparse.tools.commands import kv_dtype

    cache, model = config.cache_config, config.model_config
    dtype = str(model.dtype).removeprefix("torch.")
    kept = kv_dtype(cache.cache_dtype, model)
    return {
        "kv_dtype": SHORT.get(kept, kept),
        "weights": model.quantization or SHORT[dtype],
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def prefill_pairs(llm) -> tuple[int, int]:
    """(query, key) pairs that sparse prefill attended so far, and the causal ones of the same queries."""
    counts = llm.collective_rpc("sparse_metrics")[0]  # the other GPUs count their own heads' alike
    return counts["prefill_attended_pairs"], counts["prefill_causal_pairs"]


def time_batch(engine, batch, params, least_steps: int) -> dict:
    """Run one batch to its end and time the steps in which every request decodes; ``reason`` where there are
    fewer than ``least_steps``."""
    start = time.perf_counter()
    for index, request in enumerate(batch):
        tokens = [(7 * i + 13 * index) % 30000 + 10 for i in range(request.context_tokens)]
        engine.add_request(f"{time.monotonic_ns()}-{index}", {"prompt_token_ids": tokens}, params)
    tokens = {}
    first, stamps = None, []
    while engine.has_unfinished_requests():
        found = {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
        now = time.perf_counter()
        # A request that the cache has no room for waits, or is computed again, while the others decode.
        together = len(found) == len(batch) and all(count > tokens.get(name, 0) for name, count in found.items())
        tokens |= found
        if first is None and len(tokens) == len(batch):
            first = now - start
        if together:
            stamps.append(now)
    if len(stamps) < least_steps:
        return {"reason": f"all requests decoded in {len(stamps)} steps only; the cache may not hold them at once"}
    gaps = sorted(b - a for a, b in itertools.pairwise(stamps))
    # Of 64 gaps the 99th percentile is the second largest: an indication, no tail.
    return {
        "tpot_ms": round(statistics.median(gaps) * 1e3, 4),
        "p99_ms": round(gaps[int(len(gaps) * 0.99) - 1] * 1e3, 4),
        "ttft_ms": round(first * 1e3, 2),
        "steps": len(gaps),
    }


if __name__ == "__main__":
    main()

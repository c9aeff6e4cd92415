"""Time the real vLLM engine with K and V on the GPU (stock, resident) and in CPU memory (offload).

    python -m benchmarks.offload --gpu-gib 24 --host-gib 20 --stock-gpu-gib 72 --modes stock,offload 1q1s128k
    python -m benchmarks.offload --gpu-gib 24 --host-gib 20 --modes stock 1q1s128k
    python -m benchmarks.offload --host-gib 110 --modes stock,offload 3q1s128k 6q1s128k
    python -m benchmarks.offload --gpu-gib 72 --host-gib 20 --modes resident,offload 1q1s128k
    python -m benchmarks.offload --gpu-gib 24 --host-gib 20 --host-dtype fp8 --modes offload 1q1s128k
    python -m benchmarks.offload --host-gib 98 --modes offload --sparse '{"prefill_policy": "vertical_slash",
        "prefill_top_p": 0, "slash_tokens": 512}' 1q1s768k

Each mode runs in a fresh process on the same GPU, in the Llama-3.1-8B shape with random weights unless
``--model`` names another. A batch whose contexts a mode cannot hold at once is not run in it, and an engine
that does not start is a result too. TPOT is the median time of the steps in which every request of the batch
decodes: prompts take several steps each, so the first requests generate more tokens until the last one begins.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results
from benchmarks.batch_spec import max_num_seqs, parse
from benchmarks.engine import KV_CACHE_DTYPES
from benchmarks.shapes import model_of, shape_name
from vllm_sparse.config import SparseConfig
from vllm_sparse.offload.config import HOST_DTYPES

MODES = ("stock", "resident", "offload")
COUNTS = ("head_pages_looked_up", "head_pages_fetched", "head_pages_in_place", "decode_steps")
LEAST_CHUNK = 8192
"""Tokens of a step that prompts are taken to need, unless ``--batched-tokens`` says less."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["1q1s128k"])
    parser.add_argument("--modes", default="stock,offload", help=f"of {', '.join(MODES)}, separated by commas")
    parser.add_argument("--model", default="", help="a model directory or name; default: Llama-3.1-8B's shape")
    parser.add_argument("--layers", type=int, default=32, help="of the default shape")
    parser.add_argument("--gpu-gib", type=float, default=0.0, help="GPU memory in all; default: 90 %% of the GPU")
    parser.add_argument("--stock-gpu-gib", type=float, default=0.0, help="the same of stock; default: --gpu-gib")
    parser.add_argument("--host-gib", type=float, default=20.0, help="pinned host memory of offload")
    parser.add_argument(
        "--host-dtype", default="auto", choices=HOST_DTYPES, help="how offload stores K and V there"
    )
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="of all modes")
    parser.add_argument("--hot-fraction", type=float, default=None, help="default: auto")
    parser.add_argument("--sparse", default="{}", help="sparse settings of resident and offload as JSON")
    parser.add_argument("--baseline", default="FLASH_ATTN", help="stock attention backend")
    parser.add_argument("--tokens", type=int, default=129, help="steps in which all requests decode")
    parser.add_argument("--batched-tokens", type=int, default=None, help="--max-num-batched-tokens of all modes")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.modes = args.modes.split(",")
    for mode in args.modes:
        if mode not in MODES:
            parser.error(f"--modes: unknown mode {mode!r}; allowed: {', '.join(MODES)}")
    return args


def main() -> None:
    args = parse_args()
    if args.worker:
        print("RESULT " + json.dumps(measure(args)), flush=True)
        return
    found = {mode: run_worker(mode) for mode in args.modes}
    rows = []
    print(
        f"{'batch':>10} {'mode':>9} {'TPOT':>11} {'tokens/s':>9} {'TTFT':>10} {'hit rate':>9} "
        f"{'host MiB/step':>14}"
    )
    for mode, result in found.items():
        if not result["started"]:
            print(f"{'':>10} {mode:>9}  did not run: {result['reason']}")
            rows.append(row_of(args, mode, result, "", {}) | {"bench": "start"})
            continue
        for spec in args.specs:
            times = result[spec]
            if times is None:
                print(f"{spec:>10} {mode:>9}  does not fit {result['capacity_tokens']} tokens of KV")
                continue
            hit = "" if times["hit_rate"] is None else f"{100 * times['hit_rate']:8.1f}%"
            print(
                f"{spec:>10} {mode:>9} {times['tpot_ms']:8.3f} ms {times['tokens_per_s']:9.1f} "
                f"{times['ttft_ms'] / 1e3:8.2f} s {hit:>9} {times['host_mib_per_step'] or 0:14.2f}"
            )
            stock = found.get("stock", {}).get(spec) if mode != "stock" else None
            rows.append(row_of(args, mode, result, spec, times) | {"bench": "offload"} | compared(times, stock))
    for mode, result in found.items():
        if result["started"]:
            print(f"{mode}: {result['capacity_tokens']} tokens of KV, engine start {result['start_s']} s")
    results.append("offload", rows, args.out)


def output_tokens(args, batch: list) -> int:
    """So many that the first request of a batch still runs ``--tokens`` steps after the last one's prefill."""
    chunk = min(LEAST_CHUNK, args.batched_tokens or LEAST_CHUNK)
    return args.tokens + sum(-(-request.context_tokens // chunk) + 1 for request in batch[1:])


def time_batch(engine, batch: list, params) -> dict:
    """Time the steps from the one in which the last request decodes to the one in which the first ends."""
    start, ids = time.perf_counter(), []
    for index, request in enumerate(batch):
        ids.append(f"{time.monotonic_ns()}-{index}")
        tokens = [(7 * i + 13 * index) % 30000 + 10 for i in range(request.context_tokens)]
        engine.add_request(ids[-1], {"prompt_token_ids": tokens}, params)
    begun: set[str] = set()
    first, stamps, ended = None, [], False
    while engine.has_unfinished_requests() and not ended:
        for output in engine.step():
            begun.add(output.request_id)
            ended |= output.finished
        if len(begun) == len(batch):
            stamps.append(time.perf_counter())
            first = first or stamps[0] - start
    engine.abort_request(ids)
    while engine.has_unfinished_requests():
        engine.step()
    gaps = sorted(b - a for a, b in itertools.pairwise(stamps))
    return {
        "tpot_ms": round(statistics.median(gaps) * 1e3, 4),
        "p99_ms": round(gaps[int(len(gaps) * 0.99) - 1] * 1e3, 4),
        "ttft_ms": round(first * 1e3, 2),
        "steps": len(gaps),
    }


def gpu_gib(args, mode: str) -> float:
    return args.stock_gpu_gib if mode == "stock" and args.stock_gpu_gib else args.gpu_gib


def settings_of(args, mode: str) -> dict:
    """Sparse settings of a mode: the same policy and layers in both."""
    settings = {"dense_layers": 0, **json.loads(args.sparse)}
    if mode == "offload":
        hot = {} if args.hot_fraction is None else {"hot_fraction": args.hot_fraction}
        settings["offload"] = {"host_gib": args.host_gib, "host_dtype": args.host_dtype, **hot}
    return settings


def row_of(args, mode: str, result: dict, spec: str, times: dict) -> dict:
    batch = parse(spec) if spec else []
    shape = args.model or shape_name("llama-8b", args.layers)
    config = SparseConfig.from_mapping(settings_of(args, "resident"), "--sparse")
    policy = {} if mode == "stock" else {"policy": config.decode_policy, "budget": config.budget_tokens}
    return result.get("environment", {}) | policy | {
        "shape": shape, "mode": mode, "tp": args.tp, "batch_spec": spec,
        "batch": len(batch), "context": max((r.context_tokens for r in batch), default=None),
        "gpu_gib": gpu_gib(args, mode) or None, "host_gib": args.host_gib if mode == "offload" else None,
        "host_dtype": args.host_dtype if mode == "offload" else None,
        "kv_dtype": "bf16" if args.kv_cache_dtype == "auto" else args.kv_cache_dtype,
        "backend": args.baseline if mode == "stock" else "sparse",
        "sparse": None if mode == "stock" else settings_of(args, mode), "eager": args.eager,
        "started": result["started"], "reason": result.get("reason"),
        "capacity_tokens": result.get("capacity_tokens"), "start_s": result.get("start_s"), **times,
    }  # fmt: skip


def compared(times: dict, stock: dict | None) -> dict:
    """Time per token beside that of stock in the same run; nothing where stock did not run the batch."""
    if not stock:
        return {}
    baseline, sparse = stock["tpot_ms"], times["tpot_ms"]
    return {"baseline_ms": baseline, "sparse_ms": sparse, "speedup": round(baseline / sparse, 3)}


def run_worker(mode: str) -> dict:
    """Measure one mode in a process of its own; its log goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.offload", "--worker", mode, *sys.argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        found, reason = {}, ""
        for line in process.stdout:
            if line.startswith("RESULT "):
                found = json.loads(line[7:])
                continue
            if "Error: " in line and "skip_tokenizer_init" not in line:  # vLLM logs that one on every start
                reason = reason or line.strip()
            if "sparse attention" in line or "KV cache" in line or "Error" in line or line.startswith(mode):
                print(line, end="", file=sys.stderr, flush=True)
    if found:
        return found | {"started": True}
    return {"started": False, "reason": reason or f"exit code {process.returncode}", "environment": environment()}


def environment() -> dict:
    """Of this machine, asked in another process: this one must not hold GPU memory."""
    script = "import json; from benchmarks import results; print(json.dumps(results.environment()))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(args) -> dict:
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets collective_rpc send the function that counts
    from vllm import LLM, SamplingParams

    mode, batches = args.worker, {spec: parse(spec) for spec in args.specs}
    longest = max(r.context_tokens + output_tokens(args, batch) for batch in batches.values() for r in batch)
    model, weights = args.model, "auto"
    if not model:
        model, weights = str(model_of("llama-8b", args.layers)), "dummy"
    more = {}
    if args.batched_tokens:
        more["max_num_batched_tokens"] = args.batched_tokens
    if mode != "stock":
        more["additional_config"] = {"sparse": settings_of(args, mode)}
    start = time.perf_counter()
    llm = LLM(
        model, load_format=weights, skip_tokenizer_init=True,
        attention_backend=args.baseline if mode == "stock" else "sparse",
        max_model_len=longest, max_num_seqs=max_num_seqs(batches.values()),
        gpu_memory_utilization=share_of_gpu(gpu_gib(args, mode)), enable_prefix_caching=False,
        disable_log_stats=True, enforce_eager=args.eager, tensor_parallel_size=args.tp,
        kv_cache_dtype=args.kv_cache_dtype, **more,
    )  # fmt: skip
    found = {"start_s": round(time.perf_counter() - start, 1)}
    cache = llm.llm_engine.vllm_config.cache_config
    found["capacity_tokens"] = capacity = cache.num_gpu_blocks * cache.block_size
    for spec, batch in batches.items():
        found[spec] = None
        more_tokens = output_tokens(args, batch)
        if sum(r.context_tokens + more_tokens + cache.block_size for r in batch) > capacity:
            continue
        params = SamplingParams(max_tokens=more_tokens, temperature=0, ignore_eos=True, detokenize=False)
        before = counts(llm)
        times = time_batch(llm.llm_engine, batch, params)
        times["tokens_per_s"] = round(len(batch) / times["tpot_ms"] * 1e3, 2)
        times |= host_traffic(before, counts(llm))
        found[spec] = times
        print(mode, spec, times, flush=True)
    found["environment"] = results.environment()
    return found


def share_of_gpu(gib: float) -> float:
    """``gpu_memory_utilization`` of ``gib``; vLLM's usual share without a limit."""
    if not gib:
        return 0.9
    from vllm.platforms import current_platform

    return gib * 2**30 / current_platform.get_device_total_memory()


def counts(llm) -> dict:
    from vllm_sparse import metrics

    return llm.collective_rpc(metrics.snapshot)[0]


def host_traffic(before: dict, after: dict) -> dict:
    """Hit rate of decode steps and what they read from the host, of one rank; None without offload."""
    if "head_page_bytes" not in after:
        return {"hit_rate": None, "host_mib_per_step": None, "head_pages_in_place": None}
    looked_up, fetched, in_place, steps = (after[name] - before[name] for name in COUNTS)
    moved = fetched + in_place
    return {
        "hit_rate": round(1 - moved / looked_up, 4) if looked_up else None,
        "host_mib_per_step": round(moved * after["head_page_bytes"] / 2**20 / max(1, steps), 3),
        "head_pages_in_place": in_place,
    }


if __name__ == "__main__":
    main()

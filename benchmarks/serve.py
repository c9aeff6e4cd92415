"""Tails under load: ``vllm bench serve`` with prompts of mixed lengths, against stock and sparse servers in turn.

    python -m benchmarks.serve --requests 24 --input-tokens 1k-64k -- --max-num-batched-tokens 8192

Both backends get the same requests. Without ``--model``, random weights in the Llama-3.1-8B shape. What follows
``--`` goes to both servers. Start-up is timed from process start to healthy, cold (empty caches of compiled
kernels and graphs, one set per backend) and, from ``--starts 2``, warm, in turn: stock, sparse, stock, sparse.
The last start of each serves the requests.

ITL, the gaps between tokens, has most of its gaps in steps that only decode; TPOT, a request's mean gap, also
holds the prefill of requests that came meanwhile. P99 of TPOT and TTFT over a few dozen requests is about
their largest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path

from benchmarks import results
from benchmarks.engine import KV_CACHE_DTYPES
from benchmarks.shapes import LLAMA_8B
from vllm_sparse.config import SparseConfig
from vllm_sparse.tools.demo.server import LOG_TAIL_LINES, Server, ServerError

PERCENTILES = (50, 90, 99)
LATENCIES = ("tpot", "itl", "ttft")
TABLE = ("tpot_p50", "tpot_p99", "itl_p50", "itl_p99", "ttft_p50", "ttft_p99")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
}  # fmt: skip
RANGE = re.compile(r"(\d+)(k?)(?:-(\d+)(k?))?")
# Room for the special tokens that a model's own tokenizer adds to a prompt.
SPECIAL_TOKENS = 16
# Loads what a server loads, so that the first start reads little more from the disk than the others.
DESCRIBE = """
import json, torch
import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.gpu_worker
from benchmarks import results
if torch.cuda.is_available():
    ones = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    (ones @ ones).cpu()
print("RESULT " + json.dumps(results.environment()))
"""
_began = time.monotonic()


class BenchmarkError(RuntimeError):
    """``vllm bench serve`` failed, or did not measure what it should have."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a model directory or name; default: Llama-3.1-8B's shape")
    parser.add_argument("--sparse", default="{}", help="sparse settings as JSON")
    parser.add_argument("--baseline", default="FLASH_ATTN", help="stock attention backend; '' skips it")
    parser.add_argument("--requests", type=_positive, default=32)
    parser.add_argument("--input-tokens", type=token_range, default="1024-65536", help="such as 8192 or 1k-64k")
    parser.add_argument("--output-tokens", type=_positive, default=128)
    parser.add_argument("--rate", type=float, default=float("inf"), help="requests per second; default: at once")
    parser.add_argument("--max-concurrency", type=_positive, default=8, help="requests in the server at a time")
    parser.add_argument("--warmups", type=int, default=1, help="requests before the measured ones")
    parser.add_argument(
        "--starts", type=_positive, default=2, help="of each server: the first cold, the others warm"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=_positive, default=1)
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of both servers")
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16", help="fp8: quantised when loaded")
    parser.add_argument("--gpu-memory", type=float, default=0.9)
    parser.add_argument("--keep", type=Path, help="folder for logs and caches; default: a temporary one")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("server", nargs="*", metavar="-- SERVER_ARGUMENTS", help="for both servers")
    args = parser.parse_args(argv)
    if not args.rate > 0:
        parser.error(f"--rate: {args.rate}; allowed: a number above 0, or inf")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, at least 1")
    return int(text)


def token_range(text: str) -> tuple[int, int]:
    """(lowest, highest) of ``8192``, ``1024-65536`` or ``1k-64k``, in tokens."""
    match = RANGE.fullmatch(text)
    if match:
        low, low_k, high, high_k = match.groups()
        lowest = int(low) * (1024 if low_k else 1)
        highest = int(high) * (1024 if high_k else 1) if high else lowest
        if 1 <= lowest <= highest:
            return lowest, highest
    raise argparse.ArgumentTypeError(f"{text!r}; allowed: LOWEST-HIGHEST in tokens, such as 1024-65536 or 1k-64k")


def centre_and_ratio(lowest: int, highest: int) -> tuple[int, float]:
    """The range as ``vllm bench serve`` takes it: centre, and share of it to either side.

    It rounds outwards, so the share is a little smaller than the quotient; an odd range loses its highest length.
    """
    centre = (lowest + highest) // 2
    return centre, (centre - lowest) / centre * (1 - 1e-9)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # A plain SIGTERM would skip the `with` block that ends the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        rows = measure(args)
    except (ServerError, BenchmarkError, ValueError) as error:
        raise SystemExit(f"benchmarks.serve: {error}") from None
    say(f"rows appended to {results.append('serve', rows, args.out)}")


def say(text: str) -> None:
    print(f"{time.monotonic() - _began:7.1f} s  {text}", flush=True)


def measure(args: argparse.Namespace) -> list[dict]:
    """Start, load and stop each backend; print the table. Returns one row per metric."""
    config = SparseConfig.from_mapping(json.loads(args.sparse), "--sparse")
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        work.mkdir(parents=True, exist_ok=True)
        environment = describe()
        say(", ".join(f"{key} {value}" for key, value in environment.items()))
        model = args.model or str(write_model(work / "model", LLAMA_8B))
        backends = {"stock": args.baseline, "sparse": "sparse"} if args.baseline else {"sparse": "sparse"}
        found = {side: {"starts_s": []} for side in backends}
        for turn in range(args.starts):
            for side, backend in backends.items():
                began = time.perf_counter()
                with Server(
                    model, server_arguments(args, backend), work / f"{side}-{turn}.log",
                    on_gpu=environment["gpu"] != "none", environment=ENVIRONMENT | caches(work / f"cache-{side}"),
                ) as server:  # fmt: skip
                    found[side]["starts_s"].append(round(time.perf_counter() - began, 2))
                    say(f"{side} ({backend}): start {turn + 1} took {found[side]['starts_s'][-1]} s")
                    if turn == args.starts - 1:
                        found[side] |= load(args, server, model, work / f"{side}.json")
                        say(f"{side}: {args.requests} requests in {found[side]['duration_s']:.1f} s")
                say(f"{side}: stopped")
    stock, sparse = found.get("stock"), found["sparse"]
    if stock and stock["input_tokens"] != sparse["input_tokens"]:
        raise BenchmarkError(
            f"prompts of {stock['input_tokens']} and of {sparse['input_tokens']} tokens are not the same"
        )
    print_table(stock, sparse)
    lowest, highest = args.input_tokens
    kv_dtype = "bf16" if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    common = environment | {
        "shape": args.model or "Llama-3.1-8B", "mode": "resident", "tp": args.tp, "batch": args.max_concurrency,
        "context": f"{lowest}-{highest}", "budget": config.budget_tokens, "policy": config.decode_policy,
        "prefill_policy": config.prefill_policy, "sparse": json.loads(args.sparse), "baseline": args.baseline,
        "requests": args.requests, "input_tokens": sparse["input_tokens"], "output_tokens": args.output_tokens,
        "rate": str(args.rate), "seed": args.seed, "warmups": args.warmups, "server": args.server,
        "preemptions_baseline": stock and stock["preemptions"], "preemptions_sparse": sparse["preemptions"],
        "kv_tokens_baseline": stock and stock["kv_tokens"], "kv_tokens_sparse": sparse["kv_tokens"],
        "attended": sparse["attended"], "kv_dtype": kv_dtype, "baseline_kv_dtype": kv_dtype if stock else None,
        "weights": args.weights, "drafts": 0, "default": not json.loads(args.sparse),
    }  # fmt: skip
    return make_rows(common, stock, sparse)


def describe() -> dict:
    """GPU, versions, commit and date, from a process that leaves the GPU again."""
    process = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True)
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise BenchmarkError(f"vLLM's server cannot be imported:\n{process.stderr}")


def write_model(folder: Path, config: dict) -> Path:
    """A model without weights, and a tokenizer whose tokens are words: a text of n words has n tokens.

    ``vllm bench serve`` sends its random tokens as text. Byte-level tokens would come back as others, and more.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    # The end's name must begin no word: a special token is cut out of a text before its words are.
    end = config["eos_token_id"]
    words = {"<end>" if token == end else f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def server_arguments(args: argparse.Namespace, backend: str) -> list[str]:
    longest = args.input_tokens[1] + args.output_tokens + SPECIAL_TOKENS
    options = {
        "attention-backend": backend, "load-format": "auto" if args.model else "dummy", "max-model-len": longest,
        "max-num-seqs": args.max_concurrency, "gpu-memory-utilization": args.gpu_memory,
        "tensor-parallel-size": args.tp, "kv-cache-dtype": args.kv_cache_dtype,
    }  # fmt: skip
    if args.weights == "fp8":
        options["quantization"] = "fp8"
    if backend == "sparse":
        options["additional-config"] = json.dumps({"sparse": json.loads(args.sparse)})
    # The warm-up's prompt is also the first measured one.
    return [f"--{name}={value}" for name, value in options.items()] + ["--no-enable-prefix-caching", *args.server]


def caches(folder: Path) -> dict[str, str]:
    """Where everything that compiles keeps its results: Triton, vLLM, torch's compiler and CUDA's."""
    names = ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    return {name: str(folder / name.lower()) for name in names}


def load(args: argparse.Namespace, server: Server, model: str, result: Path) -> dict:
    """Send the requests; what ``vllm bench serve`` measured and what the server says of itself."""
    centre, ratio = centre_and_ratio(*args.input_tokens)
    options = {
        "backend": "openai", "base-url": f"http://127.0.0.1:{server.port}", "model": "demo", "tokenizer": model,
        "dataset-name": "random", "seed": args.seed, "num-prompts": args.requests, "num-warmups": args.warmups,
        "random-input-len": centre, "random-range-ratio": json.dumps({"input": ratio, "output": 0.0}),
        "random-output-len": args.output_tokens, "request-rate": args.rate, "temperature": 0,
        "max-concurrency": args.max_concurrency, "percentile-metrics": ",".join(LATENCIES),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "result-dir": result.parent, "result-filename": result.name,
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--ignore-eos", "--disable-tqdm", "--save-result"]
    command += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.run(
        command, env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    result.with_suffix(".bench.log").write_text(process.stdout)
    if process.returncode:
        tail = "\n".join(deque(process.stdout.splitlines(), LOG_TAIL_LINES))
        raise BenchmarkError(f"vllm bench serve ended with code {process.returncode}:\n{tail}\n{server.tail()}")
    return read_result(json.loads(result.read_text()), args.requests, args.output_tokens) | read_server(server)


def read_result(result: dict, requests: int, output_tokens: int) -> dict:
    """Latencies in milliseconds as ``tpot_p50``, and totals, from the JSON of ``vllm bench serve``."""
    if result["completed"] != requests or result["total_output_tokens"] != requests * output_tokens:
        raise BenchmarkError(
            f"{result['completed']} of {requests} requests completed, with {result['total_output_tokens']} "
            f"of {requests * output_tokens} output tokens"
        )
    found = {f"{name}_p{p}": round(result[f"p{p}_{name}_ms"], 3) for name in LATENCIES for p in PERCENTILES}
    return found | {
        "tokens_per_s": round(result["output_throughput"], 2),
        "duration_s": round(result["duration"], 2),
        "input_tokens": result["total_input_tokens"],
    }


def read_server(server: Server) -> dict:
    """Preemptions, size of the KV cache, and the share of tokens attended, as far as the server tells them."""
    preempted = re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", server.get("/metrics"), re.MULTILINE)
    log = server.log()
    cache = re.search(r"KV cache size: ([\d,]+) tokens", log)
    reports = re.findall(r"sparse attention: attended (\d+) of (\d+) tokens .* in (.+) so far", log)
    return {
        "preemptions": sum(int(float(count)) for count in preempted) if preempted else None,
        "kv_tokens": int(cache[1].replace(",", "")) if cache else None,
        "attended": {what: round(int(attended) / int(context), 4) for attended, context, what in reports},
    }


def make_rows(common: dict, stock: dict | None, sparse: dict) -> list[dict]:
    """One row per metric; a speedup above 1 says that sparse is better."""

    def row(bench: str, unit: str, baseline: float | None, ours: float, speedup: float | None, **more) -> dict:
        measured = {f"baseline_{unit}": baseline, f"sparse_{unit}": ours}
        return common | {"bench": f"serve_{bench}", **measured, "speedup": speedup and round(speedup, 3), **more}

    rows = []
    for name in (f"{latency}_p{p}" for latency in LATENCIES for p in PERCENTILES):
        baseline, ours = stock and stock[name], sparse[name]
        rows.append(row(name, "ms", baseline, ours, baseline and baseline / ours))
    baseline, ours = stock and stock["tokens_per_s"], sparse["tokens_per_s"]
    rows.append(row("throughput", "tokens_per_s", baseline, ours, baseline and ours / baseline))
    for kind, baseline, ours in start_times(stock, sparse):
        overhead = baseline and round(ours - baseline, 2)
        rows.append(row(f"start_{kind}", "s", baseline, ours, baseline and baseline / ours, overhead_s=overhead))
    return rows


def start_times(stock: dict | None, sparse: dict) -> list[tuple[str, float | None, float]]:
    """(cold or warm, stock, sparse) in seconds; of several warm starts the fastest, as noise only adds."""
    times = [("cold", stock and stock["starts_s"][0], sparse["starts_s"][0])]
    if sparse["starts_s"][1:]:
        times.append(("warm", stock and min(stock["starts_s"][1:]), min(sparse["starts_s"][1:])))
    return times


def print_table(stock: dict | None, sparse: dict) -> None:
    def line(title: str, unit: str, baseline: float | None, ours: float, higher_is_better: bool = False) -> None:
        left = f"{baseline:10.2f}" if stock else f"{'':10}"
        ratio = (ours / baseline if higher_is_better else baseline / ours) if stock else 0
        print(f"{title:>14} {left} {ours:10.2f} {unit:9}" + (f"{ratio:5.2f}x" if stock else ""))

    print(f"{'':14} {'stock':>10} {'sparse':>10} {'':9} ratio")
    for name in TABLE:
        latency, percentile = name.split("_")
        line(f"{percentile.upper()} {latency.upper()}", "ms", stock and stock[name], sparse[name])
    line("output", "tokens/s", stock and stock["tokens_per_s"], sparse["tokens_per_s"], higher_is_better=True)
    for kind, baseline, ours in start_times(stock, sparse):
        line(f"{kind} start", "s", baseline, ours)
    for name, found in (("stock", stock), ("sparse", sparse)):
        if found:
            facts = {key: found[key] for key in ("kv_tokens", "preemptions", "attended") if found[key]}
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))


if __name__ == "__main__":
    main()

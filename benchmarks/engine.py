"""Time the real vLLM engine, stock against sparse, in fresh processes on the same GPU.

    python -m benchmarks.engine --model MODEL 1q1s8k 1q1s128k 8q1s32k
    python -m benchmarks.engine --tp 2 --executor ray --shape llama-70b --layers 40 1q1s128k

Without ``--model``, random weights in the shape of a Llama 3.1. TPOT is the median time between
output tokens of all running requests; TTFT the time to the first token of the batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results
from benchmarks.batch_spec import max_num_seqs, parse

LLAMA_8B = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256,
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=1048576, rms_norm_eps=1e-5, rope_theta=500000.0,
    hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16",
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA_70B = LLAMA_8B | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
SHAPES = {"llama-8b": ("Llama-3.1-8B", LLAMA_8B), "llama-70b": ("Llama-3.1-70B", LLAMA_70B)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["1q1s8k", "1q1s32k", "1q1s128k", "8q1s32k"])
    parser.add_argument("--model", default="", help="a model directory or name; default: random weights")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="of random weights")
    parser.add_argument("--layers", type=int, help="of random weights; fewer hold longer contexts")
    parser.add_argument("--sparse", default="{}", help="sparse settings as JSON")
    parser.add_argument("--baseline", default="FLASH_ATTN", help="stock attention backend; '' skips it")
    parser.add_argument("--tokens", type=int, default=65, help="output tokens per request")
    parser.add_argument("--tp", type=int, default=1, help="GPUs, for both backends")
    parser.add_argument("--executor", choices=("mp", "ray"), help="for --tp above 1; default: mp")
    parser.add_argument("--gpu-memory", type=float, default=0.9)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.tp > 1:
        args.executor = args.executor or "mp"
    elif args.executor:
        parser.error("--executor is for --tp above 1")
    return args


def main() -> None:
    args = parse_args()
    if args.worker:
        print("RESULT " + json.dumps(measure(args)), flush=True)
        return
    backends = ([args.baseline] if args.baseline else []) + ["sparse"]
    times = {backend: run_worker(backend) for backend in backends}
    stock, sparse = times.get(args.baseline, {}), times["sparse"]
    print(
        f"{'batch':>12} {'stock TPOT':>11} {'sparse TPOT':>12} {'ratio':>6} {'stock TTFT':>11} {'sparse TTFT':>12}"
    )
    rows = []
    for spec in args.specs:
        ours, theirs = sparse[spec], stock.get(spec, {})
        sides = (("stock", theirs), ("sparse", ours))
        reasons = [f"{side}: {found['reason']}" for side, found in sides if "reason" in found]
        if reasons:
            print(f"{spec:>12} not compared; {'; '.join(reasons)}")
            continue
        ratio = theirs.get("tpot_ms", 0) / ours["tpot_ms"]
        print(
            f"{spec:>12} {theirs.get('tpot_ms', 0):8.3f} ms {ours['tpot_ms']:9.3f} ms {ratio:5.2f}x "
            f"{theirs.get('ttft_ms', 0):8.0f} ms {ours['ttft_ms']:9.0f} ms"
        )
        for bench in ("tpot", "ttft"):
            baseline = theirs.get(f"{bench}_ms")
            rows.append(
                sparse["environment"]
                | {
                    "bench": bench, "shape": args.model or shape_name(args.shape, args.layers), "mode": "resident",
                    "tp": args.tp, "executor": args.executor,
                    "batch": len(parse(spec)), "context": max(r.context_tokens for r in parse(spec)),
                    "batch_spec": spec, "budget": sparse["budget"], "policy": sparse["policy"],
                    "prefill_policy": sparse["prefill_policy"], "prefill_density": ours["prefill_density"],
                    "sparse": json.loads(args.sparse), "baseline": args.baseline, "eager": args.eager,
                    "kv_dtype": "bf16", "baseline_kv_dtype": "bf16", "weights": "bf16", "drafts": 0,
                    "default": not json.loads(args.sparse),
                    "baseline_ms": baseline, "sparse_ms": ours[f"{bench}_ms"],
                    "p99_baseline_ms": theirs.get("p99_ms"), "p99_sparse_ms": ours["p99_ms"],
                    "speedup": round(baseline / ours[f"{bench}_ms"], 3) if baseline else None,
                    "start_baseline_s": stock.get("start_s"), "start_sparse_s": sparse["start_s"],
                    "free_baseline_gib": stock.get("free_gib"), "free_sparse_gib": sparse["free_gib"],
                }
            )  # fmt: skip
    print(f"engine start: stock {stock.get('start_s', 0)} s, sparse {sparse['start_s']} s")
    print(f"GPU memory left at the end: stock {stock.get('free_gib', 0)} GiB, sparse {sparse['free_gib']} GiB")
    results.append("engine", rows, args.out)


def shape_name(shape: str, layers: int | None) -> str:
    """Of random weights."""
    name, config = SHAPES[shape]
    return name + (f" with {layers} layers" if layers not in (None, config["num_hidden_layers"]) else "")


def model_of(shape: str, layers: int | None) -> Path:
    """A directory with the config of a shape, always the same one: vLLM caches compiled kernels by its path."""
    folder = Path(tempfile.gettempdir(), "vllm-sparse-shapes", f"{shape}-{layers or 'all'}")
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape][1] | ({"num_hidden_layers": layers} if layers else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_worker(backend: str) -> dict:
    """Measure one backend in a process of its own; its log goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.engine", "--worker", backend, *sys.argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        found = {}
        for line in process.stdout:
            if line.startswith("RESULT "):
                found = json.loads(line[7:])
            elif "sparse attention" in line or "GPU KV cache size" in line or "Error" in line:
                print(line, end="", file=sys.stderr)
    if process.returncode or not found:
        raise SystemExit(f"the {backend} engine failed with exit code {process.returncode}")
    return found


def measure(args) -> dict:
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from vllm import LLM, SamplingParams

    batches = {spec: parse(spec) for spec in args.specs}
    longest = max(r.context_tokens for batch in batches.values() for r in batch)
    model, weights = args.model, "auto"
    if not model:
        model, weights = str(model_of(args.shape, args.layers)), "dummy"
    sparse = args.worker == "sparse"
    start = time.perf_counter()
    llm = LLM(
        model, load_format=weights, skip_tokenizer_init=True, attention_backend=args.worker,
        max_model_len=longest + 256, max_num_seqs=max_num_seqs(batches.values()),
        gpu_memory_utilization=args.gpu_memory, enable_prefix_caching=False, disable_log_stats=True,
        enforce_eager=args.eager, tensor_parallel_size=args.tp,
        distributed_executor_backend=args.executor,
        additional_config={"sparse": json.loads(args.sparse)} if sparse else {},
    )  # fmt: skip
    found = {"start_s": round(time.perf_counter() - start, 1)}
    pairs = prefill_pairs(llm) if sparse else (0, 0)
    for spec, batch in batches.items():
        params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True, detokenize=False)
        found[spec] = time_batch(llm.llm_engine, batch, params)
        if sparse and "reason" not in found[spec]:
            before, pairs = pairs, prefill_pairs(llm)
            attended, causal = pairs[0] - before[0], pairs[1] - before[1]
            found[spec]["prefill_density"] = round(attended / causal, 4) if causal else None
        print(args.worker, spec, found[spec], file=sys.stderr, flush=True)
    import torch

    found["free_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 2)
    if sparse:
        from vllm_sparse.config import SparseConfig

        config = SparseConfig.from_mapping(json.loads(args.sparse), "--sparse")
        found |= {"budget": config.budget_tokens, "policy": config.decode_policy}
        found["prefill_policy"] = config.prefill_policy
        found["environment"] = results.environment()
    llm.llm_engine.engine_core.shutdown()  # waits for the workers, whose memory the next engine needs
    return found


def prefill_pairs(llm) -> tuple[int, int]:
    """(query, key) pairs that sparse prefill attended so far, and the causal ones of the same queries."""
    counts = llm.collective_rpc("sparse_metrics")[0]  # the other GPUs count their own heads' alike
    return counts["prefill_attended_pairs"], counts["prefill_causal_pairs"]


def time_batch(engine, batch, params) -> dict:
    """Run one batch to its end and time the steps in which every request decodes; ``reason`` where too few do."""
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
    if len(stamps) < params.max_tokens // 2:
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

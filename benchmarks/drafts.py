"""What drafts bring on text that copies: n-grams on the demo's model, stock against sparse, with and without.

    python -m benchmarks.drafts                     # SmolLM2-135M, on whatever this machine has
    python -m benchmarks.drafts --drafts 3 --context 6000 --tokens 200

A passage of Python's own sources, then the first lines of a function in its middle: the model goes on with the
function, as it does where it edits code or quotes, and n-grams find what comes next. Each engine runs in a process
of its own. Rows say tokens a second, accepted drafts a step, and after how many tokens the answer leaves that of
stock without drafts (-1: never).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results

MODULES = ("argparse", "tarfile")
SIDES = (("stock", 0), ("stock", None), ("sparse", 0), ("sparse", None))
"""Backend, and drafts; None: those of the command."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--context", type=int, default=6000, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--sparse", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument("--dtype", default="float32", help="float32: greedy tokens depend on no batch size")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.worker:
        print("RESULT " + json.dumps(measure(args, *args.worker)), flush=True)
        return
    found = {}
    for backend, drafts in SIDES:
        side = (backend, args.drafts if drafts is None else drafts)
        found[side] = run_worker(*side)
        print(*side, {key: value for key, value in found[side].items() if key != "answers"}, flush=True)
    rows = [row_of(args, side, of_side, found["stock", 0]) for side, of_side in found.items()]
    results.append("drafts", rows, args.out)


def row_of(args, side: tuple[str, int], found: dict, stock: dict) -> dict:
    """A row of an engine beside stock without drafts."""
    leaves = [
        first_difference(mine, other) for mine, other in zip(found["answers"], stock["answers"], strict=True)
    ]
    return found["environment"] | {
        "bench": "drafts", "shape": "SmolLM2-135M-Instruct", "mode": "resident", "tp": 1, "batch": 1,
        "context": args.context, "backend": side[0], "drafts": side[1], "tokens": args.tokens,
        "budget": found.get("budget"), "policy": found.get("policy"), "sparse": args.sparse,
        "default": not args.sparse, "kv_dtype": args.dtype, "baseline_kv_dtype": args.dtype, "weights": args.dtype,
        "tokens_per_s": found["tokens_per_s"], "baseline_tokens_per_s": stock["tokens_per_s"],
        "speedup": round(found["tokens_per_s"] / stock["tokens_per_s"], 3),
        "tokens_per_step": found["tokens_per_step"], "same_tokens": leaves,
    }  # fmt: skip


def first_difference(mine: list[int], other: list[int]) -> int:
    """Where two answers part; -1 where they do not."""
    return next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), -1)


def prompts(tokenizer, context: int) -> list[list[int]]:
    """A passage of ``context`` tokens each, that ends with the first lines of a function in its middle."""
    found = []
    for name in MODULES:
        source = inspect.getsource(__import__(name))
        tokens = tokenizer.encode(source)[: context - 60]
        text = tokenizer.decode(tokens)
        start = text.rindex("\n    def ", 0, len(text) * 2 // 3)
        again = tokenizer.encode("\n\n# The function once more:\n" + text[start : start + 240])[:60]
        found.append(tokens[: context - len(again)] + again)
    return found


def run_worker(backend: str, drafts: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.drafts", *sys.argv[1:], "--worker", json.dumps([backend, drafts])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"{backend} with {drafts} drafts ended with code {done.returncode}")
    return json.loads(lines[-1][7:])


def measure(args, backend: str, drafts: int) -> dict:
    """Answers of one engine, one request at a time, and how long they took."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    from vllm import LLM, SamplingParams

    from vllm_sparse.tools.demo import smollm2

    on_gpu = torch.cuda.is_available()
    ngrams = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    stock = "FLASH_ATTN" if on_gpu and args.dtype != "float32" else "TRITON_ATTN" if on_gpu else "CPU_ATTN"
    llm = LLM(
        str(smollm2.prepare()), dtype=args.dtype, attention_backend="sparse" if backend == "sparse" else stock,
        max_model_len=args.context + args.tokens + 64, max_num_seqs=1, disable_log_stats=False,
        additional_config={"sparse": args.sparse} if backend == "sparse" else {},
        speculative_config=ngrams if drafts else None, enforce_eager=not on_gpu,
        **({} if on_gpu else {"kv_cache_memory_bytes": 2 << 30, "block_size": 32}),
    )  # fmt: skip
    batch = prompts(llm.get_tokenizer(), args.context)
    once = SamplingParams(max_tokens=1, temperature=0)
    params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    answers, seconds = [], 0.0
    for tokens in batch:
        llm.generate([{"prompt_token_ids": tokens}], once, use_tqdm=False)  # the timed run finds its prefix cached
        start = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        seconds += time.perf_counter() - start
        answers.append(list(output.outputs[0].token_ids))
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    steps = counts.get("vllm:spec_decode_num_drafts", 0)
    accepted = counts.get("vllm:spec_decode_num_accepted_tokens", 0)
    generated = args.tokens * len(batch)
    found = {
        "environment": results.environment(), "answers": answers, "tokens_per_s": round(generated / seconds, 2),
        "tokens_per_step": round(generated / max(1, generated - accepted), 3), "drafted_steps": steps,
    }  # fmt: skip
    if backend == "sparse":
        from vllm_sparse.config import SparseConfig

        config = SparseConfig.from_mapping(args.sparse, "--sparse")
        found |= {"budget": config.budget_tokens, "policy": config.decode_policy}
    return found


if __name__ == "__main__":
    main()

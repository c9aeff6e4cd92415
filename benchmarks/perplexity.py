"""Perplexity of a long text under prefill policies, beside dense prefill, on any machine.

    python -m benchmarks.perplexity --context 7900 '{"prefill_policy": "vertical_slash"}' ...

Each argument is a set of sparse settings. Tokens of the second half are judged, which have most to look
back to. The model is SmolLM2-135M, the text essays, both from packages; appends JSON lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

from benchmarks import results

DENSE = {"prefill_policy": "dense"}
COMMON = {"decode_policy": "dense", "min_prefill_tokens": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=['{"prefill_policy": "vertical_slash"}'])
    parser.add_argument("--context", type=int, default=7900)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--skip-tokens", type=int, default=0, help="tokens of the essays before the text")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_CI_ENV", "1"),
                        ("TORCHDYNAMO_DISABLE", "1")):  # fmt: skip
        os.environ.setdefault(name, value)
    from transformers import AutoTokenizer

    from vllm_sparse.demo import smollm2
    from vllm_sparse.demo.texts import essays

    model = smollm2.prepare()
    tokens = AutoTokenizer.from_pretrained(model).encode(essays(), verbose=False)
    tokens = tokens[args.skip_tokens : args.skip_tokens + args.context]
    dense = None
    for settings in [DENSE, *map(json.loads, args.settings)]:
        perplexity, density = measure(model, tokens, settings, args)
        dense = dense or perplexity
        print(f"{perplexity:8.4f} {perplexity / dense:7.4f}x density {density} {settings}", flush=True)
        row = results.environment() | {
            "bench": "perplexity", "shape": smollm2.MODEL_NAME, "mode": "resident", "tp": 1, "batch": 1,
            "context": args.context, "chunk": args.chunk, "skip_tokens": args.skip_tokens,
            "policy": settings["prefill_policy"], "sparse": settings, "density": density,
            "perplexity": round(perplexity, 5), "dense_perplexity": round(dense, 5),
        }  # fmt: skip
        results.append("perplexity", [row], args.out)


def measure(model, tokens: list[int], settings: dict, args) -> tuple[float, float | None]:
    """Perplexity of the second half, and the share of causal pairs that sparse chunks attended."""
    from vllm import LLM, SamplingParams

    from vllm_sparse import metrics

    metrics.reset()
    llm = LLM(
        str(model), dtype="float32", max_model_len=len(tokens) + 8, max_num_seqs=1, block_size=16,
        max_num_batched_tokens=args.chunk, attention_backend="sparse", enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30, additional_config={"sparse": {**COMMON, **settings}},
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    output = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
    counts = metrics.snapshot()
    llm.llm_engine.engine_core.shutdown()
    half = len(tokens) // 2
    losses = [-output.prompt_logprobs[i][tokens[i]].logprob for i in range(half, len(tokens))]
    causal = counts["prefill_causal_pairs"]
    density = round(counts["prefill_attended_pairs"] / causal, 4) if causal else None
    return math.exp(sum(losses) / len(losses)), density


if __name__ == "__main__":
    main()

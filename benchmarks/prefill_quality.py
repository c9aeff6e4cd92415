"""Perplexity and needles of a real model under every prefill policy, beside dense prefill, on any machine.

    python -m benchmarks.prefill_quality
    python -m benchmarks.prefill_quality --split dev --needles 0 '{"prefill_policy": "vertical_slash"}'

Without arguments every policy runs at several sizes or coverages; else each argument is a set of sparse
settings. Perplexity is of the second half of each passage, which has most to look back to; a needle is a
number hidden in essays, found if the greedy answer holds it. Passages and needles are split in two halves:
whoever chooses a setting looks at ``dev``, and ``report`` is what is published. One engine runs all
settings; decode is dense. Appends a JSON line per setting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.policy_switch import PolicySwitch

COMMON = {"decode_policy": "dense", "min_prefill_tokens": 1024, "head_patterns": "none"}
"""Of all settings unless they say otherwise; contexts of a small model are shorter than what ships as
``min_prefill_tokens``, and patterns tuned here once must not be in a row that does not name them."""
COVERAGES = (0.8, 0.9, 0.95, 0.98, 0.99)
RECENT_TOKENS = (512, 1024, 2048, 4096)
INITIAL_TOKENS = 128
DEPTHS = (0.05, 0.3, 0.5, 0.7, 0.9)
FIRST_SEED = {"dev": 0, "report": 1000}
PROMPT_TOKENS = 100
"""Of a needle's prompt: what is not essay, at most."""
ANSWER_TOKENS = 12


def parse_args(description: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", type=json.loads, help="sparse settings as JSON; default: a grid")
    parser.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    parser.add_argument("--split", choices=FIRST_SEED, default="report")
    parser.add_argument("--context", type=int, default=7900, help="tokens of a passage")
    parser.add_argument("--needle-context", type=int, default=7500, help="tokens of a needle's prompt")
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=2048, help="query tokens of a step")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    os.environ.update(variables(gpu=torch.cuda.is_available()))
    from transformers import AutoTokenizer

    model = prepared(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts, needles = passages(tokenizer, args), needle_prompts(tokenizer, args)
    engine = Engine(model, args)
    environment, dense = results.environment(), None
    print(f"{'policy':>14} {'density':>8} {'perplexity':>11} {'of dense':>9} {'needles':>8} {'lost':>5}  time")
    for settings in [{"prefill_policy": "dense"}, *(args.settings or grid())]:
        start = time.perf_counter()
        settings = resolved(settings)
        found = engine.measure(settings, texts, needles, tokenizer)
        dense = dense or found
        row = environment | {
            "bench": "prefill_quality", "shape": model.name, "mode": "resident", "tp": 1, "batch": 1,
            "context": args.context, "chunk": args.chunk, "page_size": args.page_size, "budget": None,
            "split": args.split, "dtype": engine.dtype, "kernel": engine.kernel,
            "policy": settings["prefill_policy"], "sparse": settings,
            "density": found.density, "needle_density": found.needle_density,
            "perplexity": round(found.perplexity, 5), "dense_perplexity": round(dense.perplexity, 5),
            "passages": [round(math.exp(loss), 5) for loss in found.losses],
            "dense_passages": [round(math.exp(loss), 5) for loss in dense.losses],
            "needle_context": args.needle_context, "needles": len(needles), "needle_hits": sum(found.hits),
            "dense_needle_hits": sum(dense.hits),
            "needles_lost": sum(a and not b for a, b in zip(dense.hits, found.hits, strict=True)),
        }  # fmt: skip
        results.append("prefill_quality", [row], args.out)
        shown = {key: value for key, value in settings.items() if key not in COMMON}
        print(
            f"{row['policy']:>14} {row['density'] or 1:8.3f} {row['perplexity']:11.4f} "
            f"{found.perplexity / dense.perplexity - 1:+9.2%} {row['needle_hits']:>4}/{len(needles):<3} "
            f"{row['needles_lost']:>5} {time.perf_counter() - start:5.0f}s {shown}",
            flush=True,
        )


def prepared(name: str) -> Path:
    """Where ``--model`` lies, fetched if need be."""
    from benchmarks import gemma
    from vllm_sparse.demo import smollm2

    return {"smollm2": smollm2, "gemma3": gemma}[name].prepare()


def variables(gpu: bool) -> dict[str, str]:
    """Environment of an engine in this process."""
    both = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
    return both if gpu else both | {"VLLM_CPU_CI_ENV": "1", "TORCHDYNAMO_DISABLE": "1"}


def resolved(settings: dict) -> dict:
    """These settings with all that sizes a policy, for rows that outlive today's defaults."""
    from vllm_sparse.config import SparseConfig

    config = SparseConfig.from_mapping({**COMMON, **settings}, "settings")
    sizes = {name: getattr(config, name) for name in ("prefill_coverage", "vertical_tokens", "slash_tokens")}
    return {**COMMON, **sizes, **settings}


def grid() -> list[dict]:
    """Every sparse policy at sizes that span densities: recent tokens if fixed, else coverages."""
    from vllm_sparse.policies.fixed import FixedPolicy
    from vllm_sparse.policies.registry import PREFILL_POLICIES

    settings = []
    for name, policy in PREFILL_POLICIES.items():
        if issubclass(policy, FixedPolicy):
            sizes = [{"vertical_tokens": INITIAL_TOKENS, "slash_tokens": recent} for recent in RECENT_TOKENS]
        elif name != "dense":
            sizes = [{"prefill_coverage": coverage} for coverage in COVERAGES]
        else:
            continue
        settings += [{"prefill_policy": name, **size} for size in sizes]
    return settings


def passages(tokenizer, args) -> list[list[int]]:
    """Consecutive passages of essays, from their first half for ``dev`` and their second for ``report``."""
    from vllm_sparse.demo.texts import essays

    tokens = tokenizer.encode(essays(), add_special_tokens=False, verbose=False)
    opening = tokenizer.encode("")
    half, size = len(tokens) // 2, args.context - len(opening)
    if args.passages * size > half:
        raise SystemExit(f"--passages {args.passages} of {size:,} tokens: a half of the essays has {half:,}")
    first = half if args.split == "report" else 0
    return [opening + tokens[first + i * size : first + (i + 1) * size] for i in range(args.passages)]


def needle_prompts(tokenizer, args) -> list[tuple[list[int], str]]:
    """Prompts of about ``needle_context`` tokens, and the number to find in each."""
    from vllm_sparse.demo.texts import needle_prompt

    prompts = []
    for i in range(args.needles):
        depth, seed = DEPTHS[i % len(DEPTHS)], FIRST_SEED[args.split] + i
        messages, number = needle_prompt(tokenizer, args.needle_context - PROMPT_TOKENS, depth, seed=seed)
        text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        prompts.append((tokenizer.encode(text, add_special_tokens=False, verbose=False), number))
    return prompts


@dataclass
class Found:
    losses: list[float]
    """Mean negative log-likelihood of each passage's second half; all are equally long."""
    density: float | None
    """Share of causal (query, key) pairs that sparse chunks of the passages attended; None: none was sparse."""
    hits: list[bool]
    needle_density: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.losses) / len(self.losses))


class Engine:
    """One vLLM engine that runs all settings."""

    def __init__(self, model: Path, args, sparse: dict | None = None):
        """``sparse``: settings other than :data:`COMMON` that cannot change once it runs."""
        import torch
        from vllm import LLM
        from vllm_sparse.plugin_entrypoints import register

        from vllm_sparse import metrics

        register()
        self.switch, self.metrics, sparse = PolicySwitch(), metrics, {**COMMON, **(sparse or {})}
        self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        with self.switch.watching():
            self.llm = LLM(
                str(model), dtype=self.dtype, max_model_len=max(args.context, args.needle_context) + 64,
                max_num_seqs=4, max_num_batched_tokens=args.chunk, block_size=args.page_size, enforce_eager=True,
                skip_tokenizer_init=True, enable_prefix_caching=False, kv_cache_memory_bytes=2 << 30,
                gpu_memory_utilization=0.5, disable_log_stats=True, attention_backend="sparse",
                additional_config={"sparse": {**sparse, "prefill_policy": "vertical_slash"}},
            )  # fmt: skip
        self.switch.to({**sparse, "prefill_policy": "dense"})
        self.kernel = type(self.switch.layers[-1].prefill_engine).__module__.rpartition(".")[2]

    def measure(self, settings: dict, texts, needles, tokenizer) -> Found:
        from vllm import SamplingParams

        self.switch.to(settings)
        sparse = settings["prefill_policy"] != "dense"
        score = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        answer = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, detokenize=False)
        pairs = self._pairs()
        # One after the other: in a batch chunks would end elsewhere, and estimates look at a chunk's end.
        losses = [self._loss(tokens, score) for tokens in texts]
        density, pairs = self._density(pairs, sparse and bool(texts)), self._pairs()
        outputs = self._generate([tokens for tokens, _ in needles], answer)
        answers = [tokenizer.decode(output.outputs[0].token_ids) for output in outputs]
        hits = [number in text for (_, number), text in zip(needles, answers, strict=True)]
        return Found(losses, density, hits, self._density(pairs, sparse and bool(needles)))

    def _generate(self, prompts: list[list[int]], params) -> list:
        return self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)

    def _loss(self, tokens: list[int], params) -> float:
        logprobs = self._generate([tokens], params)[0].prompt_logprobs
        second_half = range(len(tokens) // 2, len(tokens))
        return -sum(logprobs[i][tokens[i]].logprob for i in second_half) / len(second_half)

    def _pairs(self) -> tuple[int, int]:
        counts = self.metrics.snapshot()
        return counts["prefill_attended_pairs"], counts["prefill_causal_pairs"]

    def _density(self, before: tuple[int, int], sparse: bool) -> float | None:
        attended, causal = (now - then for now, then in zip(self._pairs(), before, strict=True))
        if (causal > 0) != sparse:
            raise SystemExit(f"{causal} pairs of sparse prefill, where sparse is {sparse}: the policy did not run")
        return round(attended / causal, 4) if causal else None


if __name__ == "__main__":
    main()

"""EvalEngine: one vLLM engine that runs all settings whose pages store the same summary."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.prefill.gate import AUTO
from vllm_sparse.tools import commands
from vllm_sparse.tools.eval.estimate import STEPS, Speed
from vllm_sparse.tools.eval.samples import Sample
from vllm_sparse.tools.eval.settings import Group, Setting
from vllm_sparse.tools.eval.tasks import PREFILL_TEXT, TEXT

TOP_TOKENS = 64
"""Log-probabilities kept of each step; the rest of the vocabulary is one more outcome."""

Distribution = dict[int, float]
"""Log-probabilities of the likeliest tokens of a step, and of the one that was forced."""


@dataclass
class Answer:
    """Results of a sample's decode steps under a setting."""

    texts: list[str]
    """What was said in each turn; nothing of a sample of :data:`TEXT`."""
    steps: list[Distribution]
    """The steps that are scored, of a sample of :data:`TEXT`."""
    generated: int
    """Tokens said in all turns."""
    losses: list[float] = field(default_factory=list)
    """Of a sample of :data:`PREFILL_TEXT`, losses of its tokens from the second on."""
    reused: int = 0
    """Of those, tokens whose K and V later turns found in the prefix cache, as sparse steps had written them."""


@dataclass
class Found:
    """Results of a batch of samples under a setting."""

    answers: list[Answer]
    attended: float | None
    """Share of the context attended in decode steps; None where none ran."""
    prefill_density: float | None
    """Share of causal (query, key) pairs attended in chunks of prefill; None where it is dense."""
    recall: list[list[float]] | None
    """[sparse layers, KV heads] mass of the chosen pages, relative to that of the best; None: not measured."""
    mass: list[list[float]] | None
    """[sparse layers, KV heads] mass of the chosen pages, relative to that of all; None: not measured."""
    layers: list[int]


class EvalEngine:
    def __init__(self, llm: Any, common: dict):
        self.llm, self.common = llm, common
        self.tokenizer = llm.get_tokenizer()
        self._warm: list[str] = []
        self._prefill_density: float | None = None
        self._texts: list[Answer] = []

    @classmethod
    @contextmanager
    def start(cls, args, group: Group, common: dict) -> Iterator[EvalEngine]:
        """Start an engine that can run all settings of ``group``."""
        import torch

        from vllm_sparse import metrics

        # What an engine before held is in cycles that have just become garbage.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        metrics.reset()
        llm = commands.start_engine(
            args, additional_config={"sparse": group.start.mapping(common)},
            max_model_len=max(args.lengths), max_num_batched_tokens=args.chunk, max_num_seqs=args.batch,
            enable_prefix_caching=True, enforce_eager=True, async_scheduling=False,
            max_logprobs=TOP_TOKENS, logits_processors=["vllm_sparse.tools.eval.force:ForcedTokens"],
            worker_extension_cls="vllm_sparse.tools.eval.worker.EvalWorker",
            gpu_memory_utilization=args.gpu_memory_utilization,
            kv_cache_dtype_skip_layers=args.kv_cache_dtype_skip_layers or [],
            generation_config="vllm", disable_log_stats=True,
        )  # fmt: skip
        try:
            engine = cls(llm, common)
            engine._check_sparse(args.model)
            yield engine
        finally:
            llm.llm_engine.engine_core.shutdown()

    def _counts(self) -> dict:
        return self.llm.collective_rpc("eval_counts")[0]

    def _check_sparse(self, model: str) -> None:
        counts = self._counts()
        if not counts["sparse_layers"]:
            # An engine before in this process may have been told the reasons, which vLLM remembers.
            reasons = "; ".join([*counts["dense_layers"], *counts["stock_layers"]]) or "the log says why"
            raise ConfigError(
                f"{model}: no layer of this model can be sparse ({reasons}); allowed: models with "
                f"full-attention layers, dense_layers below their number"
            )

    def speed(self, sample: Sample, batch: int) -> Speed:
        """The speed of this engine on a prompt like that of ``sample``, and on ``batch`` of it at a time."""
        from vllm import SamplingParams

        def seconds(tokens: list[int], count: int, steps: int, salt: str = "speed") -> float:
            params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            self._generate([tokens] * count, [salt] * count, params)
            return time.perf_counter() - start

        # What is compiled at first use is no speed.
        seconds(sample.tokens[: len(sample.tokens) // 8], batch, 2, "compiling")
        prefill = seconds(sample.tokens, 1, 1)
        # From the cache, but for the prompt's last page.
        decode = seconds(sample.tokens, batch, STEPS) - seconds(sample.tokens, batch, 1)
        return Speed(len(sample.tokens) / prefill, max(decode, 0.0) / (STEPS - 1), batch)

    def run(self, setting: Setting, samples: list[Sample], recall_every: int) -> Found:
        """Answers to ``samples``, all of one task and length."""
        self.llm.collective_rpc("eval_switch", args=(setting.mapping(self.common), 0))
        self._warm_up(setting, samples)
        if samples[0].task == PREFILL_TEXT:
            return Found(self._texts, None, self._prefill_density, None, None, [])
        watched = recall_every if samples[0].task == TEXT and setting.policy != "dense" else 0
        self.llm.collective_rpc("eval_switch", args=(setting.mapping(self.common), watched))
        before = self._counts()
        answers = self._answers(setting, samples)
        workers = self.llm.collective_rpc("eval_recall") if watched else []
        attended = self._attended(setting, samples, before, self._counts())
        return Found(answers, attended, self._prefill_density, *self._recall(workers))

    def _answers(self, setting: Setting, samples: list[Sample]) -> list[Answer]:
        from vllm import SamplingParams

        from vllm_sparse.tools.eval.force import FORCED

        scored = samples[0].task == TEXT
        salts = [_salt(setting, sample) for sample in samples]
        prompts = [sample.tokens for sample in samples]
        answers = [Answer([], [], 0) for _ in samples]
        # Of each prompt's last answer: where it begins, and its tokens.
        begins, lengths = [0] * len(samples), [0] * len(samples)
        for turn in range(1 + len(samples[0].turns)):
            params = [
                SamplingParams(
                    max_tokens=sample.turns[turn - 1].max_tokens if turn else sample.max_tokens, temperature=0,
                    ignore_eos=scored, stop_token_ids=list(sample.end), detokenize=False,
                    logprobs=TOP_TOKENS if scored else None,
                    extra_args={FORCED: sample.forced} if sample.forced else None,
                )
                for sample in samples
            ]  # fmt: skip
            outputs = self._generate(prompts, salts, params)
            for index, (output, sample, answer) in enumerate(zip(outputs, samples, answers, strict=True)):
                said = list(output.outputs[0].token_ids)
                answer.generated += len(said)
                if turn:
                    answer.reused += max(0, min(output.num_cached_tokens - begins[index], lengths[index]))
                if scored:
                    answer.steps = self._steps(output, sample)
                    continue
                answer.texts.append(self.tokenizer.decode(said, skip_special_tokens=True))
                if turn < len(sample.turns):
                    # A template writes the end of an answer itself.
                    ended = said[-1] in (self.tokenizer.eos_token_id, *sample.end)
                    kept = said[:-1] if ended else said
                    begins[index], lengths[index] = len(prompts[index]), len(kept)
                    prompts[index] = [*prompts[index], *kept, *sample.turns[turn].tokens]
        return answers

    def _generate(self, prompts: list[list[int]], salts: list[str], params) -> list:
        requests = [
            {"prompt_token_ids": tokens, "cache_salt": salt} for tokens, salt in zip(prompts, salts, strict=True)
        ]
        return self.llm.generate(requests, params, use_tqdm=False)

    def _warm_up(self, setting: Setting, samples: list[Sample]) -> None:
        """Have the prompts in the prefix cache, so that each setting finds the same there."""
        from vllm import SamplingParams

        salts = [_salt(setting, sample) for sample in samples]
        if salts == self._warm:
            return
        before = self._counts()
        scored = samples[0].task == PREFILL_TEXT
        # vLLM does not look in the cache for what asks for the prompt's own log-probabilities.
        once = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0 if scored else None)
        outputs = self._generate([sample.tokens for sample in samples], salts, once)
        self._texts = [_prompt_losses(output) for output in outputs] if scored else []
        after = self._counts()
        attended, causal = (
            after[name] - before[name] for name in ("prefill_attended_pairs", "prefill_causal_pairs")
        )
        # AUTO may find that dense chunks are faster.
        if setting.prefill_policy not in ("dense", AUTO) and not causal:
            raise ConfigError(
                f"{setting.describe()}: no chunk of prefill ran sparse; the log says why. Allowed: --lengths past "
                f"min_prefill_tokens (see --sparse), models with full-attention layers"
            )
        self._warm, self._prefill_density = salts, attended / causal if causal else None

    def _steps(self, output, sample: Sample) -> list[Distribution]:
        completion = output.outputs[0]
        if list(completion.token_ids) != sample.forced:
            raise RuntimeError("the decode steps were not fed the text: this vLLM ignored the logits processor")
        return [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs[1:]]

    def _attended(self, setting: Setting, samples: list[Sample], before: dict, after: dict) -> float | None:
        attended, context = (after[name] - before[name] for name in ("attended_tokens", "context_tokens"))
        if not context:
            return None
        if (
            setting.policy != "dense"
            and attended == context
            and setting.budget < min(len(s.tokens) for s in samples)
        ):
            raise ConfigError(
                f"{setting.describe()}: no decode step of this model ran sparse; the log says why. Allowed: "
                f"models with full-attention layers, and no --sparse setting that keeps these lengths dense"
            )
        return attended / context

    def _recall(self, workers: list[dict]) -> tuple[list | None, list | None, list[int]]:
        workers = sorted(workers, key=lambda worker: worker["rank"])
        layers = sorted({int(layer) for worker in workers for layer in worker["layers"]})
        found = [[worker["layers"][str(layer)] for worker in workers] for layer in layers]
        if not found or not all(part["rows"] for ranks in found for part in ranks):
            return None, None, []
        recall = [
            [c / b for part in ranks for c, b in zip(part["chosen"], part["best"], strict=True)] for ranks in found
        ]
        mass = [[c / part["rows"] for part in ranks for c in part["chosen"]] for ranks in found]
        return recall, mass, layers


def _prompt_losses(output) -> Answer:
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return Answer([], [], 0, [-step[token].logprob for step, token in pairs])


def _salt(setting: Setting, sample: Sample) -> str:
    """A salt that keeps out of a prompt's cache what decode steps and other prefill policies wrote; where a task's
    later turns are to find what decode steps wrote, those of other settings."""
    own = f" {setting.describe()}" if sample.turns else ""
    return f"{setting.prefill_policy} {setting.top_p} {sample.task} {sample.length} {sample.seed}{own}"


def loss(steps: list[Distribution], forced: list[int]) -> float:
    """Mean negative log-likelihood of the text's own tokens, in nats."""
    return -sum(step[token] for step, token in zip(steps, forced, strict=True)) / len(steps)


def divergence(dense: list[Distribution], sparse: list[Distribution]) -> float:
    """Mean KL divergence of sparse from dense steps in nats, a lower bound.

    Tokens that both steps list are outcomes of their own, and all others together are one more: merging
    outcomes can only lower a divergence.
    """
    total = 0.0
    for p, q in zip(dense, sparse, strict=True):
        both = p.keys() & q.keys()
        total += sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
        rest_p, rest_q = (max(1 - sum(math.exp(x[token]) for token in both), 1e-9) for x in (p, q))
        total += rest_p * math.log(rest_p / rest_q)
    return total / len(dense)


def agreement(dense: list[Distribution], sparse: list[Distribution]) -> float:
    """Share of steps whose likeliest token is the same."""
    same = sum(max(p, key=p.get) == max(q, key=q.get) for p, q in zip(dense, sparse, strict=True))
    return same / len(dense)

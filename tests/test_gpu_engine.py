"""The real engine on a GPU: CUDA graphs, both model runners, drafts to verify, no waiting for the device."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path

import pytest
import torch
from cases import ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

LENGTHS = (3000, 700, 40)
ENGINE = dict(
    dtype="float32",  # so that greedy tokens depend on no batch size
    max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=1024, kv_cache_memory_bytes=256 << 20,
    gpu_memory_utilization=0.1, block_size=16, disable_log_stats=True,
)  # fmt: skip
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
SPARSE = {"budget_tokens": 512, "min_context_tokens": 1024, "dense_layers": 1}
POLICIES = {
    "midbound": {**SPARSE, "recall_monitor_every_steps": 4},
    "sketch": {**SPARSE, "decode_policy": "sketch"},
    "twilight": {**SPARSE, "decode_policy": "twilight"},
}
NEAR_TIE = 0.01
"""Natural logarithm of a ratio of probabilities: stock attention multiplies float32 as TF32."""
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Answer(list):
    """Greedy outputs of a batch, with their likeliest rivals, and what was seen of the engine that gave them."""

    counts: dict
    """What this batch added up to."""
    runner: str
    """The module of vLLM's model runner."""
    waits: list[str]
    """Lines of this package that made the host wait in another batch."""


def answers_of(model: Path, prompts: list[dict] | None = None):
    """A function from settings of an engine to its :class:`Answer` to ``prompts``; one engine for each."""
    import gc

    import tiny_engine
    from vllm import LLM, SamplingParams

    from vllm_sparse import metrics

    known: dict[str, Answer] = {}

    def run(sparse: dict | None, variant: str = "", see=None, forced: bool = False, **settings):
        """Start an engine, unless one with these settings was started before.

        Args:
            variant: what a fixture changed.
            see: looks at the engine after the batch; in the first call with these settings.
            forced: every engine goes on with the same tokens, whatever it would have chosen.
        """
        name = repr((sparse, variant, forced, sorted(settings.items())))
        if name in known:
            return known[name]
        if sparse is not None:
            settings["additional_config"] = {"sparse": sparse}
            settings["attention_backend"] = "sparse"
        settings.setdefault("enforce_eager", "compilation_config" not in settings)
        metrics.reset()
        llm = LLM(str(model), **{**ENGINE, **settings})
        try:
            params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=4)
            if forced:
                params.allowed_token_ids = [7]
            batch = prompts or [{"prompt_token_ids": tokens} for tokens in tiny_engine.prompts(LENGTHS)]
            found = Answer(output.outputs[0] for output in llm.generate(batch, params, use_tqdm=False))
            found.runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__
            found.counts = metrics.snapshot()
            if see is not None:
                see(llm)
            found.waits = synchronising_lines(llm) if sparse is not None else []
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            torch.cuda.empty_cache()
        known[name] = found
        return found

    return run


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    pytest.importorskip("vllm")
    import tiny_model

    path = tmp_path_factory.mktemp("models") / "llama"
    return answers_of(tiny_model.make(path, num_attention_heads=8, head_dim=64, num_hidden_layers=4))


def other_runner(answer, monkeypatch, *args, **settings) -> Answer:
    """The answer by that one of vLLM's two model runners which it does not take by itself."""
    is_v2 = "worker.gpu." in answer(*args, **settings).runner
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if is_v2 else "1")
    found = answer(*args, variant="V1" if is_v2 else "V2", **settings)
    assert ("worker.gpu." in found.runner) != is_v2, f"both ran {found.runner}"
    return found


def assert_same(found, expected) -> None:
    """Equal tokens, up to the first place where two tokens are as likely as each other but for rounding."""
    for mine, other in zip(found, expected, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(mine.token_ids, other.token_ids, strict=True)) if a != b]
        if differ:
            likely = other.logprobs[differ[0]]
            a, b = mine.token_ids[differ[0]], other.token_ids[differ[0]]
            assert a in likely and likely[b].logprob - likely[a].logprob < NEAR_TIE, (
                f"token {differ[0]}: {a}, not {b}"
            )


@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_replay_eager(answer, policy):
    graphs = answer(POLICIES[policy], compilation_config=GRAPHS)
    assert graphs.counts["attended_tokens"] < 0.7 * graphs.counts["context_tokens"], "nothing was sparse"
    assert_same(graphs, answer(POLICIES[policy]))


def test_recall_monitor_in_graphs(answer):
    """The recall monitor measures in graphs what it does without."""
    (graphs,), (eager,) = (
        answer(POLICIES["midbound"], **settings).counts["recall_by_layer"]
        for settings in ({"compilation_config": GRAPHS}, {})
    )
    assert graphs[0] is None and all(0 < share < 1 for share in graphs[1:])
    assert graphs[1:] == pytest.approx(eager[1:], rel=0.02)


def test_both_model_runners(answer, monkeypatch):
    found = other_runner(answer, monkeypatch, POLICIES["midbound"], compilation_config=GRAPHS)
    assert_same(found, answer(POLICIES["midbound"], compilation_config=GRAPHS))


def test_drafts_with_a_budget_of_the_context(answer):
    """Sparse with drafts must say what stock vLLM says without."""
    everything = {**SPARSE, "budget_tokens": 4096}
    stock = answer(sparse=None, attention_backend="TRITON_ATTN")
    for settings in ({}, {"compilation_config": GRAPHS}):
        found = answer(sparse=everything, speculative_config=DRAFTS, **settings)
        assert_same(found, stock)
        assert found.counts["dense_verification_steps"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_in_graphs(answer, policy):
    """Few pages, chosen by the last token and its drafts: with graphs as without, and nothing waits."""
    graphs, eager = (
        answer(POLICIES[policy], speculative_config=DRAFTS, **settings)
        for settings in ({"compilation_config": GRAPHS}, {})
    )
    assert_same(graphs, eager)
    assert graphs.counts["attended_tokens"] < 0.7 * graphs.counts["context_tokens"], "nothing was sparse"
    assert graphs.counts["dense_verification_steps"] == 0
    assert not graphs.waits, graphs.waits[:3]


def synchronising_lines(llm) -> list[str]:
    """Lines of this package in whose calls a batch made the host wait: PyTorch reports every such call."""
    import tiny_engine

    ours = []

    def record(message, *_):
        frames = [frame for frame in traceback.extract_stack() if "vllm_sparse" in frame.filename]
        if frames:
            ours.append(f"{message} {frames[-1:]}")

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = record
            # Other prompts than those that the prefix cache has.
            tiny_engine.tokens(llm, tiny_engine.prompts(LENGTHS, seed=2), 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ours


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("graphs", [{}, {"compilation_config": GRAPHS}], ids=["eager", "graphs"])
def test_nothing_waits_for_the_device(answer, policy, graphs):
    """None in a decode step, nor in prefill."""
    waits = answer(POLICIES[policy], **graphs).waits
    assert not waits, waits[:3]

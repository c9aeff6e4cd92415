"""What vLLM does on a GPU alone: its runner builds all twice, graphs replay prompt tokens, engines sleep."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from cases import ON_GPU
from test_gpu_engine import ENGINE, GRAPHS, SPARSE, assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

EVERYTHING = {**SPARSE, "budget_tokens": 4096}
LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("vllm")
    import tiny_model

    root = tmp_path_factory.mktemp("models")

    def make(model_type: str = "llama", **changes):
        settings = {"num_attention_heads": 8, "head_dim": 64, "num_hidden_layers": LAYERS, **changes}
        name = f"{model_type}-{abs(hash(repr(sorted(changes.items()))))}"
        return str(tiny_model.make(root / name, model_type, **settings))

    return make


@contextmanager
def engine(model: str, sparse: dict | None, **settings):
    from vllm import LLM

    from vllm_sparse import metrics

    metrics.reset()
    if sparse is not None:
        settings |= {"attention_backend": "sparse", "additional_config": {"sparse": sparse}}
    llm = LLM(model, **{**ENGINE, "compilation_config": GRAPHS, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()


def answers(llm, lengths=(3000, 700, 40), max_tokens: int = 24) -> list:
    import tiny_engine
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=4)
    batch = [{"prompt_token_ids": tokens} for tokens in tiny_engine.prompts(lengths)]
    return [output.outputs[0] for output in llm.generate(batch, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def counted(model):
    """What an engine with runner V1 or V2 counted for two prompts, and its first tokens of a lone last token."""
    known: dict[str, tuple] = {}

    def of(runner: str) -> tuple[dict, list]:
        if runner not in known:
            from vllm_sparse import metrics

            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
                with engine(model(), {**SPARSE, "recall_monitor_every_steps": 2}) as llm:
                    assert metrics.snapshot()["context_tokens"] == 0, "warm-up was counted"
                    answers(llm, (3000, 700), 17)
                    (counts,) = llm.collective_rpc("sparse_metrics")
                    assert llm.reset_prefix_cache()
                    known[runner] = counts, lone_tokens(llm)
        return known[runner]

    return of


def lone_tokens(llm) -> list:
    return answers(llm, (2049,), 1) + answers(llm, (2049, 1025), 1)


runners = pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])


@runners
def test_counts_on_both_runners(counted, runner):
    """Counts are those of the requests on both runners."""
    counts, _ = counted(runner)
    assert counts["sparse_layers"] == LAYERS - 1 and counts["dense_layers"] == {"dense_layers=1": 1}
    assert counts["context_tokens"] == sum(sum(range(length + 1, length + 17)) for length in (3000, 700))
    short = sum(range(701, 717))
    chosen = counts["attended_tokens"] - short
    assert 16 * (512 - 16) < chosen <= 16 * 512
    (shares,) = counts["recall_by_layer"]
    assert shares[0] is None and all(0 < share < 1 for share in shares[1:])


@pytest.fixture(scope="module")
def in_one_chunk(model):
    with engine(model(), SPARSE, max_num_batched_tokens=4096) as llm:
        return lone_tokens(llm)


@runners
def test_lone_prompt_token_attends_to_everything(counted, in_one_chunk, runner):
    """2,049 tokens in chunks of 1,024: the last one alone is a step of one token, which replays a decode graph."""
    assert_same(counted(runner)[1], in_one_chunk)


def sleep_and_wake(llm, level: int) -> None:
    llm.sleep(level=level)
    junk = torch.full((1 << 30,), 0x5A, dtype=torch.uint8, device="cuda")  # what the memory may hold next
    del junk
    torch.cuda.empty_cache()
    if level == 1:
        llm.wake_up(tags=["kv_cache"])
        llm.wake_up(tags=["weights"])
    else:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])


def test_sleep_changes_no_answer(model):
    """At level 1, and then at level 2: vLLM's allocator of memory that sleeps serves one engine a process."""
    sparse = {
        **SPARSE,
        "prefill_policy": "vertical_slash",
        "min_prefill_tokens": 512,
        "recall_monitor_every_steps": 3,
    }
    with engine(model(), sparse, enable_sleep_mode=True) as llm:
        before, (first,) = answers(llm), llm.collective_rpc("sparse_metrics")
        counts = first
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert llm.collective_rpc("sparse_metrics")[0] == counts, f"counts did not survive level {level}"
            assert_same(answers(llm), before)
            (counts,) = llm.collective_rpc("sparse_metrics")
            assert counts["context_tokens"] == (level + 1) * first["context_tokens"], f"level {level}"


def test_full_attention_beside_sliding_windows(model):
    """Gemma 3's layers, two of six full: vLLM pads their blocks, or those of the others, to one size."""
    path = model(
        "gemma3_text", num_hidden_layers=6, sliding_window=64, query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    with engine(path, None, attention_backend="TRITON_ATTN") as llm:
        stock = answers(llm)
    with engine(path, {**EVERYTHING, "dense_layers": 1}) as llm:
        found = answers(llm)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert (counts["sparse_layers"], counts["dense_layers"]) == (1, {"dense_layers=1": 1})
    assert counts["stock_layers"] == {"sliding window": 4}
    assert_same(found, stock)


def test_draft_model_with_other_heads(model):
    """A draft model with other heads starts, and answers as stock."""
    path, draft = model(), model(num_key_value_heads=1, num_attention_heads=4, num_hidden_layers=1, seed=1)
    drafts = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
    with engine(path, None, attention_backend="TRITON_ATTN") as llm:
        stock = answers(llm)
    with engine(path, EVERYTHING, speculative_config=drafts) as llm:
        found = answers(llm)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert counts["sparse_layers"] == LAYERS - 1 and counts["dense_verification_steps"] == 0
    assert sum(counts["stock_layers"].values()) == 1, counts["stock_layers"]
    assert_same(found, stock)

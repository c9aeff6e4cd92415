"""Models with layers that cannot be sparse: those run densely, the rest sparse, and all answers are right."""

from __future__ import annotations

import pytest
from tiny_engine import attention_layers, prompts, tokens

from vllm_sparse import metrics

pytestmark = [pytest.mark.engine, pytest.mark.seam]

PROMPTS = prompts()
GEMMA = {"tie_word_embeddings": True, "embedding": 0.05, "sliding_window": 64}
FULL = ["full_attention"] * 4
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SOFT_CAPPED = {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}
SINKS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None, "rope_parameters": None,
    "intermediate_size": 64,
}  # fmt: skip
# Model type, settings, sparse layers, reason -> dense layers, reason -> stock layers.
MODELS = {
    "qwen3": ("qwen3", {}, 3, {}, {}),
    "sliding_window": ("mistral", {"sliding_window": 64}, 0, {}, {"sliding window": 3}),
    "hybrid": ("gemma3_text", {**GEMMA, "layer_types": MIXED}, 1, {}, {"sliding window": 2}),
    "hybrid_of_several_groups": (
        "gemma3_text",
        {**GEMMA, "layer_types": [MIXED[0], *FULL], "num_hidden_layers": 5},
        4, {}, {"sliding window": 1},
    ),
    "alibi": ("bloom", {"n_layer": 3, "n_head": 4, "tie_word_embeddings": True}, 0, {}, {"ALiBi": 3}),
    "soft_cap": ("gemma2", {**GEMMA, **SOFT_CAPPED, "layer_types": FULL[:3]}, 3, {}, {}),
    "sinks": ("gpt_oss", {**SINKS, "layer_types": MIXED, "sliding_window": 64}, 1, {}, {"sliding window": 2}),
    "kv_sharing": (
        "gemma3n_text",
        {
            **GEMMA, "num_hidden_layers": 4, "layer_types": FULL, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
            "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [256] * 4,
            "ones": {f"model.layers.{layer}.self_attn.k_norm.weight": 32 for layer in (2, 3)},
        },
        2, {"another layer's KV cache": 2}, {},
    ),
}  # fmt: skip


def model_of(tiny, case):
    model_type, settings, *_ = MODELS[case]
    return tiny.model(model_type, **settings)


@pytest.mark.parametrize("case", MODELS)
def test_each_kind_of_layer_runs_where_it_should(tiny, case):
    model = model_of(tiny, case)
    _, _, sparse, dense, stock = MODELS[case]
    expected = tiny.stock(PROMPTS, model=model)
    assert max(len(set(answer)) for answer in expected) > 5, "this model repeats itself whatever attention does"
    with tiny.start(model, {"budget_tokens": 2048}) as llm:
        got = tokens(llm, PROMPTS)
        backends = [layer.attn_backend.get_name() for layer in attention_layers(llm).values()]
        counts = metrics.snapshot()
    assert got == expected
    assert counts["sparse_layers"] == sparse
    for wanted, counted in ((dense, counts["dense_layers"]), (stock, counts["stock_layers"])):
        assert len(counted) == len(wanted)
        for reason, number in wanted.items():
            assert [n for text, n in counted.items() if reason in text] == [number]
    assert backends.count("SPARSE") == sparse + sum(dense.values())
    assert set(backends) <= {"SPARSE", "CPU_ATTN"}


@pytest.mark.parametrize("case", ["hybrid", "hybrid_of_several_groups", "kv_sharing", "soft_cap", "sinks"])
def test_small_budget_changes_the_sparse_layers_of_mixed_models(tiny, case):
    model = model_of(tiny, case)
    batch = PROMPTS[1:]  # a prompt of one token is counted as a decode step, or not, by where it comes in a batch
    expected = tiny.stock(batch, model=model)
    with tiny.start(model, {"budget_tokens": 128}) as llm:
        got, again = tokens(llm, batch), tokens(llm, batch)
        counts = metrics.snapshot()
    lengths = [range(len(prompt) + 1, len(prompt) + 16) for prompt in batch]
    assert counts["context_tokens"] == 2 * sum(map(sum, lengths)), "each step is counted once"
    assert counts["attended_tokens"] < counts["context_tokens"]
    assert got[:2] == expected[:2], "contexts within the budget changed"
    assert got != expected
    assert got == again


def test_soft_cap_and_alibi_change_these_models(tiny):
    """Else their tests could not tell whether dense layers apply them."""
    _, capped, *_ = MODELS["soft_cap"]
    uncapped = tiny.model("gemma2", **{**capped, "attn_logit_softcapping": None})
    assert tiny.stock(PROMPTS, model=uncapped) != tiny.stock(PROMPTS, model=model_of(tiny, "soft_cap"))

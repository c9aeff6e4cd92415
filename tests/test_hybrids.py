"""Models with linear-attention, Mamba or convolution layers, beside which vLLM's blocks hold several pages."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import vllm
from test_cache_summary import EngineWrites
from tiny_engine import attention_layers, cached_tokens, kv_cache, outputs, preemptions, prompts, tokens

TOO_OLD = vllm.__version_tuple__ < (0, 32)
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(TOO_OLD, reason="vLLM 0.31 has no kernels for these in float32 on a CPU"),
]

PROMPTS, NUM_TOKENS = prompts((1, 5, 40, 300, 700)), 16
EVERYTHING, FEW = {"budget_tokens": 2048}, {"budget_tokens": 128}
MIXED = ["mamba", "attention", "mamba", "attention"]
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}  # fmt: skip
CONV = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3, "conv_dim": 128,
    "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 256, "block_ffn_dim_multiplier": 1.0,
    "block_norm_eps": 1e-5, "block_use_swiglu": True, "block_multiple_of": 16,
    "block_auto_adjust_ff_dim": False, "num_hidden_layers": 4,
}  # fmt: skip
GATED_DELTA = {
    "head_dim": 64, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "initializer_range": 0.1,  # less to be lost in 16 bits
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
# Model type, settings, dtype, sparse layers.
MODELS = {
    "granite4": ("granitemoehybrid", {
        **MAMBA, "num_hidden_layers": 4, "layer_types": MIXED, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 256, "position_embedding_type": "rope"}, "float32", 2),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 256}, "float32", 3),
    "lfm2": ("lfm2", CONV, "float32", 2),
    "qwen3_next": ("qwen3_next", {**GATED_DELTA, **EXPERTS}, "bfloat16", 1),
}  # fmt: skip


def model_of(tiny, case: str, **more):
    """The model of a case, with ``more`` settings, and options of its engines."""
    model_type, settings, dtype, _ = MODELS[case]
    return tiny.model(model_type, **settings | more), {"dtype": dtype, "enable_prefix_caching": False}


@pytest.mark.seam
@pytest.mark.parametrize("case", MODELS)
def test_full_attention_layers_run_sparse(tiny, case):
    model, options = model_of(tiny, case)
    sparse = MODELS[case][-1]
    expected = tiny.stock(PROMPTS, NUM_TOKENS, model=model, **options)
    assert max(len(set(answer)) for answer in expected) > 5, "this model repeats itself whatever attention does"
    with tiny.start(model, EVERYTHING, **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        (counts,) = llm.collective_rpc("sparse_metrics")
        assert (counts["sparse_layers"], counts["stock_layers"], counts["dense_layers"]) == (sparse, {}, {})
        assert counts["attended_tokens"] == counts["context_tokens"]
        for layer in attention_layers(llm).values():
            if hasattr(layer, "sparse_support"):
                assert layer.impl.page_size == 16 and kv_cache(layer).shape[2] == layer.impl.pages.cache_slots
    with tiny.start(model, FEW, **options) as llm:
        found = tokens(llm, PROMPTS, NUM_TOKENS)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert found[:2] == expected[:2], "contexts within the budget changed"
    assert counts["attended_tokens"] < 0.5 * counts["context_tokens"]


@pytest.mark.parametrize(
    "sparse",
    [
        {"decode_policy": "sketch"}, {"recall_monitor_every_steps": 2}, {"decode_policy": "twilight"},
        {"prefill_policy": "vertical_slash", "min_prefill_tokens": 64, "prefill_top_p": 0, "vertical_tokens": 1024,
         "slash_tokens": 1024},
    ],
    ids=["sketch", "monitor", "twilight", "prefill"],
)  # fmt: skip
def test_what_is_chosen_of_several_pages_in_a_block(tiny, sparse, monkeypatch):
    """Summaries lie with their pages inside of blocks, whatever is written where."""
    writes = EngineWrites(monkeypatch)
    model, options = model_of(tiny, "granite4")
    expected = tiny.stock(PROMPTS, NUM_TOKENS, model=model, **options)
    with tiny.start(model, {**EVERYTHING, **sparse}, **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
    with tiny.start(model, {**FEW, **sparse}, **options) as llm:
        config = llm.llm_engine.vllm_config.cache_config
        assert config.block_size > 16, "a block of this model is one page: nothing is tested"
        writes.filled.clear()
        found = tokens(llm, PROMPTS[1:], NUM_TOKENS)  # no more than run at once: blocks become states again
        assert found[0] == expected[1] and found[-1] != expected[-1]
        assert writes.check(llm)[16] > 40
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert counts["attended_tokens"] < 0.5 * counts["context_tokens"]


@pytest.mark.seam
@pytest.mark.parametrize("chunk_tokens", [64, 256], ids=["chunk", "hit"])
def test_a_lone_prompt_token_attends_to_everything(tiny, chunk_tokens):
    """The last one of a chunked prompt, or after a prefix hit: states take it as a token of an answer."""
    model, options = model_of(tiny, "lfm2")
    (prompt,) = prompts((64 * 5 + 1,), seed=9)
    options |= {"enable_prefix_caching": chunk_tokens == 256, "max_num_batched_tokens": chunk_tokens}
    with tiny.start(model, FEW, **options) as llm:
        cold, last = outputs(llm, [prompt], 1), outputs(llm, [prompt], 1)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert cached_tokens(last) == [320 if chunk_tokens == 256 else 0]
    assert counts["context_tokens"] == 0, "prompt tokens are no decode steps"
    expected = tiny.stock([prompt], 1, model=model, **model_of(tiny, "lfm2")[1])
    assert [list(result.outputs[0].token_ids) for result in cold + last] == expected * 2


def test_codes_in_blocks_of_several_pages(tiny):
    model, options = model_of(tiny, "granite4")
    answers = []
    for sparse in (EVERYTHING, {"dense_layers": 8}):
        with tiny.start(model, sparse, kv_cache_dtype="fp8", **options) as llm:
            answers.append(tokens(llm, PROMPTS, NUM_TOKENS))
    assert answers[0] == answers[1]


def test_requests_that_are_preempted(tiny):
    """A pool of few blocks, whose states and pages change places."""
    model, options = model_of(tiny, "granite4")
    batch = prompts((190,) * 4, seed=3)
    expected = tiny.stock(batch, 200, model=model, **options)
    with (
        preemptions() as seen,
        tiny.start(model, EVERYTHING, kv_cache_memory_bytes=2 << 20, **options) as llm,
    ):
        assert tokens(llm, batch, 200) == expected
    assert seen, "no request was preempted"


def test_the_first_full_attention_layers_run_dense_where_that_is_asked(tiny):
    model, options = model_of(tiny, "granite4")
    with tiny.start(model, {"dense_layers": 1}, **options) as llm:
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert (counts["sparse_layers"], counts["dense_layers"]) == (1, {"dense_layers=1": 1})

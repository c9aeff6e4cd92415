"""The families of models that ``docs/support.md`` lists: each starts, and answers as stock vLLM does."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import pytest

pytest.importorskip("vllm")

import vllm
from tiny_engine import prompts
from vllm import SamplingParams

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(vllm.__version_tuple__ < (0, 32), reason="vLLM 0.31 has not all of them"),
]

PROMPTS, NUM_TOKENS = [{"prompt_token_ids": tokens} for tokens in prompts((5, 300))], 16
EVERYTHING, FEW = {"budget_tokens": 2048}, {"budget_tokens": 128}


@dataclass(frozen=True)
class Model:
    """A tiny model: settings of its config, options of its engines, and how many layers run how."""

    model_type: str
    settings: dict
    sparse: int
    stock: dict[str, int] = field(default_factory=dict)
    """Layers by what their reason says."""
    dense: dict[str, int] = field(default_factory=dict)
    options: dict = field(default_factory=dict)


WINDOWED = ["sliding_attention"] * 3 + ["full_attention"]
SLIDING = {"num_hidden_layers": 4, "layer_types": WINDOWED, "sliding_window": 64}
WINDOWS = {"sliding window": 3}
TIED = {"tie_word_embeddings": True, "embedding": 0.05}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
STATES = {"enable_prefix_caching": False}
GATED_DELTA = {
    "head_dim": 64, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "initializer_range": 0.1,  # less to be lost in 16 bits
}  # fmt: skip
GEMMA4 = {
    **TIED, "sliding_window": 64, "num_hidden_layers": 6, "global_head_dim": 64, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}  # fmt: skip
ANOTHERS = "another layer's KV cache"
MODELS = {
    "qwen3_moe": Model("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 1}, 3),
    "glm4_moe": Model("glm4_moe", {**ROUTED, "first_k_dense_replace": 1}, 3),
    "minimax_m2": Model("minimax_m2", {
        "rotary_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": True,
        "scoring_func": "softmax", "use_routing_bias": True}, 3),
    "seed_oss": Model("seed_oss", {}, 3),
    "hy_v3": Model("hy_v3", {
        **EXPERTS, "first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True,
        "num_shared_experts": 1}, 3),
    "ministral3": Model("ministral3", {}, 3),
    "cohere2": Model("cohere2", {**TIED, **SLIDING}, 1, WINDOWS),
    "olmo3": Model("olmo3", SLIDING, 1, WINDOWS),
    "exaone4": Model("exaone4", {**SLIDING, "sliding_window_pattern": 4}, 1, WINDOWS),
    "afmoe": Model("afmoe", {
        **SLIDING, **EXPERTS, "num_dense_layers": 1, "score_func": "sigmoid", "route_norm": True, "n_group": 1,
        "topk_group": 1, "route_scale": 1.0}, 1, WINDOWS),
    "laguna": Model("laguna", {**SLIDING, "mlp_layer_types": ["dense"] * 4}, 1, WINDOWS),
    "mellum": Model("mellum", {**SLIDING, **EXPERTS}, 1, WINDOWS),
    "qwen3_5": Model("qwen3_5_text", GATED_DELTA, 1, options={**STATES, "dtype": "bfloat16"}),
    "qwen3_5_moe": Model("qwen3_5_moe_text", {
        **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 64}, 1,
        options={**STATES, "dtype": "bfloat16"}),
    "nemotron_h": Model("nemotron_h", {
        "num_hidden_layers": 4, "hybrid_override_pattern": "M*M*", "mamba_num_heads": 8, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 1, "mlp_hidden_act": "relu2", "chunk_size": 64}, 2, options=STATES),
    "zamba2": Model("zamba2", {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 16,
        "mamba_headdim": 32, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "num_key_value_heads": 4, "attention_hidden_size": 256, "attention_head_dim": 64}, 2, options=STATES),
    "lfm2_moe": Model("lfm2_moe", {
        **EXPERTS, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3,
        "num_dense_layers": 1}, 2, options=STATES),
    # Its scores are not divided by anything: in heads of 512, what a GPU rounds of them would change every answer.
    "gemma4": Model("gemma4_text", {
        **GEMMA4, "head_dim": 256, "global_head_dim": 512, "scaled": {"q_norm.weight": 0.05}}, 1,
        {"sliding window": 5}),
    "gemma4_keys_as_values": Model("gemma4_text", {
        **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2}, 1, {"sliding window": 5}),
    "gemma4_shared_caches": Model("gemma4_text", {
        **GEMMA4, "num_hidden_layers": 12, "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512}, 1, {"sliding window": 5, ANOTHERS: 5}, {ANOTHERS: 1}),
}  # fmt: skip


Step = tuple[int, float, float]
"""A token, its log-probability, and how far below the next likeliest is."""


def answers(llm, batch=PROMPTS) -> list[list[Step]]:
    """Greedy answers to the prompts of ``batch``."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    results = llm.generate(batch, params, use_tqdm=False)
    outputs = [result.outputs[0] for result in results]
    return [[*map(step_of, output.token_ids, output.logprobs)] for output in outputs]


def step_of(token: int, likely: dict) -> Step:
    """Of two tokens that are equally likely the sampler may take the one that is listed second."""
    first, second = sorted((one.logprob for one in likely.values()), reverse=True)[:2]
    return token, likely[token].logprob, first - second


def assert_same(found: list[list[Step]], expected: list[list[Step]], noise: float) -> None:
    """Answers are the same up to where the two likeliest tokens were within ``noise`` of each other."""
    for mine, theirs in zip(found, expected, strict=True):
        for (token, likely, gap), (wanted, as_likely, as_near) in zip(mine, theirs, strict=True):
            assert abs(likely - as_likely) <= max(noise, 1e-3)
            if token != wanted:
                assert max(gap, as_near) < noise
                break


def assert_counted(counted: dict[str, int], wanted: dict[str, int]) -> None:
    """Layers are counted by reasons that contain those that are wanted."""
    assert len(counted) == len(wanted), counted
    for reason, number in wanted.items():
        assert [count for text, count in counted.items() if reason in text] == [number], counted


@pytest.mark.parametrize("case", MODELS)
def test_a_model_answers_as_stock_does_and_reads_less(tiny, case):
    model = MODELS[case]
    path = tiny.model(model.model_type, **model.settings)
    noise = 0.1 if model.options.get("dtype") == "bfloat16" else 0.0
    with tiny.start(path, backend="CPU_ATTN", **model.options) as llm:
        expected = answers(llm)
    assert max(len({token for token, *_ in answer}) for answer in expected) > 5, "this model repeats itself"
    with tiny.start(path, EVERYTHING, **model.options) as llm:
        assert_same(answers(llm), expected, noise)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert counts["sparse_layers"] == model.sparse
    assert_counted(counts["stock_layers"], model.stock)
    assert_counted(counts["dense_layers"], model.dense)
    assert counts["attended_tokens"] == counts["context_tokens"] > 0
    with tiny.start(path, FEW, **model.options) as llm:
        found = answers(llm)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert_same(found[:1], expected[:1], noise)  # a context within the budget
    assert all(math.isfinite(likely) for answer in found for _, likely, _ in answer)
    assert counts["attended_tokens"] < 0.5 * counts["context_tokens"]


LATENT = {
    "head_dim": 64, "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 3, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
WIDER_KEYS = {
    "num_hidden_layers": 4, "head_dim": 64, "v_head_dim": 32, "swa_head_dim": 64, "swa_v_head_dim": 32,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "hybrid_layer_pattern": [0, 1, 1, 0],
    "sliding_window": 64, "sliding_window_size": 64, "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": False, "mlp_layer_types": ["dense"] * 4, "moe_layer_freq": [0] * 4,
    "layernorm_epsilon": 1e-6, "attention_bias": False, "partial_rotary_factor": 1.0, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "attention_value_scale": None, "rope_theta": 10000, "swa_rope_theta": 10000,
}  # fmt: skip
RUN_ON_CPUS = {"windows", "latent"}
"""The others start there, but vLLM has no kernels that attend."""
# Model type, settings, options of engines, layers, why they are stock.
STOCK = {
    "windows": ("mistral", {"sliding_window": 64}, {}, 3, "sliding window"),
    "uneven_heads": ("llama", {"head_dim": 72}, {}, 3, "head size 72"),
    "latent": ("deepseek_v3", LATENT, {"dtype": "bfloat16"}, 3, "layers of class MLAAttention"),
    "wider_keys": ("mimo_v2_flash", WIDER_KEYS, {}, 4, "_ATTN_DIFFKV by itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK)
def test_a_model_without_sparse_layers_starts_as_stock_and_says_so_in_one_line(tiny, case):
    model_type, settings, options, layers, reason = STOCK[case]
    path = tiny.model(model_type, **settings)
    runs = case in RUN_ON_CPUS
    if runs:
        with tiny.start(path, backend="CPU_ATTN", **options) as llm:
            expected = answers(llm)
    said = Said()
    logger = logging.getLogger("vllm.vllm_sparse")
    logger.addHandler(said)
    try:
        with tiny.start(path, **options) as llm:
            if runs:
                assert answers(llm) == expected
            (counts,) = llm.collective_rpc("sparse_metrics")
    finally:
        logger.removeHandler(said)
    (line,) = said.lines
    assert line.startswith(f"sparse attention does NOTHING in this engine: 0 of {layers} attention layers sparse")
    assert reason in line
    assert (counts["sparse_layers"], counts["dense_layers"]) == (0, {})
    assert sum(counts["stock_layers"].values()) == layers


class Said(logging.Handler):
    """What a logger was given, as text."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

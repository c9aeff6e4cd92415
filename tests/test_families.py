"""The families of models that ``docs/support.md`` lists: each starts, and answers as stock vLLM does."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import tiny_model
import torch
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
    since: tuple[int, int] = (0, 32)
    """The first vLLM that is asked to start it."""
    lift: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    """Takes away what would stop the model's code on a machine that cannot run it."""


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
STEP = {
    **SLIDING, "num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64,
    "share_expert_dim": 64, "use_moe_router_bias": True, "need_fp32_gate": True, "use_head_wise_attn_gate": True,
    "norm_expert_weight": True, "moe_router_scaling_factor": 1.0, "swiglu_limits": [], "swiglu_limits_shared": [],
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_seq_len": 4096,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
INTERN_S2 = {
    "text_config": {
        **tiny_model.SETTINGS, **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 64, "num_blocks": 2,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    },
    "vision_config": {"depth": 1, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 128},
}  # fmt: skip
TEXT_ALONE = {**STATES, "dtype": "bfloat16", "language_model_only": True}
ANOTHERS = "another layer's KV cache"
MODELS = {
    "qwen3_moe": Model("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 1}, 3),
    # Its loops attend a second time to what layers hold, without K and V of their own.
    "iquest_loop": Model("llama", {
        "architecture": "IQuestLoopCoderForCausalLM", "loop_num": 2, "loop_window_size": 64}, 3,
        {"sliding window": 3}),
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
    "step3p5": Model("step3p5", {
        **STEP, "architecture": "Step3p5ForCausalLM", "moe_layers_enum": "2,3", "moe_router_activation": "softmax",
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": 8, "num_attention_groups": 2,
            "head_dim": 32}}, 1, WINDOWS),
    "muse_glimmer": Model("muse_glimmer_text", {
        **SLIDING, "architecture": "MuseGlimmerForCausalLM", "qk_scale_factor": 20.0, "output_multiplier": 1.0}, 1,
        WINDOWS),
    "qwen3_5": Model("qwen3_5_text", GATED_DELTA, 1, options={**STATES, "dtype": "bfloat16"}),
    "qwen3_5_moe": Model("qwen3_5_moe_text", {
        **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 64}, 1,
        options={**STATES, "dtype": "bfloat16"}),
    "interns2_preview": Model("qwen3_5_moe", {
        **INTERN_S2, "architecture": "InternS2PreviewForConditionalGeneration"}, 1, options=TEXT_ALONE),
    "interns2_mobius": Model("qwen3_5_moe", {
        **INTERN_S2, "architecture": "InternS2MobiusForConditionalGeneration"}, 1, options=TEXT_ALONE),
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


def of_newest(case: str):
    """A case that runs with the newest vLLM, too, where its model is vLLM's alone and changes with it."""
    return pytest.param(case, marks=pytest.mark.seam) if "architecture" in MODELS[case].settings else case


@pytest.mark.parametrize("case", map(of_newest, MODELS))
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


def say_that_flash_attention_is_there(patch: pytest.MonkeyPatch) -> None:
    from vllm.models.qwen4_exp.nvidia import model, qsa  # noqa: F401 - in this order: they import each other

    patch.setattr(qsa, "is_flash_attn_varlen_func_available", lambda: True)


def call_it_flashinfer(patch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    names = {"FlashInferMetadata": None, "FlashInferTrtllmAPIDecode": None}
    flashinfer = SimpleNamespace(FlashInferImpl=CPUAttentionBackendImpl, **names)
    patch.setitem(sys.modules, "vllm.v1.attention.backends.flashinfer", flashinfer)


def take_any_latent_attention(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.v1.attention.backends.mla import indexer
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    patch.setattr(indexer.DeepseekV32IndexerBackend, "get_supported_kernel_block_sizes", lambda *_: [16])
    patch.setattr(CPUMLABackend, "supports_block_size", lambda *_: True)
    patch.setattr(mla_attention, "get_attn_backend", lambda *_, **__: CPUMLABackend)


def pack_no_weights(patch: pytest.MonkeyPatch) -> None:
    # vLLM's build for CPUs without AVX-512 has no such operation, and the layers are not run.
    patch.setattr(torch.ops._C, "convert_weight_packed", lambda weight: weight, raising=False)


INDEXED = {"head_dim": 128, "num_hidden_layers": 4, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
INKLING_MARKS = (
    "message_user", "message_model", "message_system", "message_tool", "content_text", "content_image",
    "content_model_end_sampling", "content_thinking", "content_audio_input", "content_xml",
    "content_invoke_tool_json", "end_message", "audio_end",
)  # fmt: skip
INDEXED_LATENT = {**LATENT, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 128}
LARGE_BLOCKS = {"max_model_len": 2048, "sparse": {"budget_tokens": 1024}, "kv_cache_memory_bytes": 256 << 20}
# Models that vLLM builds on a CPU, where it has no kernels that run them.
BUILT = {
    "deepseek_v32": Model("deepseek_v32", {**INDEXED_LATENT, "architecture": "DeepseekV32ForCausalLM"}, 0,
        {"class MLAAttention": 3, "class DeepseekV32IndexerCache": 3}, lift=take_any_latent_attention),
    "glm5": Model("glm_moe_dsa", {**INDEXED_LATENT, "architecture": "GlmMoeDsaForCausalLM"}, 0,
        {"class MLAAttention": 3, "class DeepseekV32IndexerCache": 3}, lift=take_any_latent_attention),
    "ling": Model("deepseek_v3", {
        **LATENT, "architecture": "BailingMoeV2_5ForCausalLM", "num_hidden_layers": 4, "layer_group_size": 4,
        "first_k_dense_replace": 4, "num_experts": 4, "num_shared_experts": 1, "moe_intermediate_size": 64,
        "rope_theta": 10000.0, "use_bias": False, "use_qkv_bias": False}, 0, {"class MLAAttention": 1},
        options=STATES, lift=take_any_latent_attention),
    "minimax_m3": Model("minimax_m3_vl", {
        "architecture": "MiniMaxM3SparseForCausalLM",
        "text_config": {
            **tiny_model.SETTINGS, **INDEXED, "dense_intermediate_size": 128, "moe_layer_freq": [0] * 4,
            "sparse_attention_config": {
                "sparse_attention_freq": [0, 0, 1, 1], "sparse_index_dim": 128, "sparse_num_index_heads": 2,
                "sparse_topk_blocks": 16, "sparse_block_size": 128}}}, 2,
        {"class MiniMaxM3SparseAttention": 2, "class MiniMaxM3IndexerCache": 2},
        options={**LARGE_BLOCKS, "block_size": 128}),
    "qwen4_exp": Model("qwen4_exp_text", {
        **GATED_DELTA, **EXPERTS, "architecture": "Qwen4ExpForCausalLM", "shared_expert_intermediate_size": 64,
        "hc_count": 2, "hc_lowrank": 32, "output_gate_type": "silu", "rope_parameters": ROPE, "indexer_n_heads": 4,
        "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 128, "indexer_compress_ratio": 16}, 0,
        {"class Qwen4ExpQSAAttention": 1, "class QSAKeyStateCache": 1, "class QSACompressedKeyCache": 1},
        options=STATES, lift=say_that_flash_attention_is_there),
    "deepseek_v4": Model("deepseek_v4", {
        **ROUTED, "architecture": "DeepseekV4ForCausalLM", "head_dim": 512, "num_key_value_heads": 1,
        "qk_rope_head_dim": 64, "q_lora_rank": 64, "o_lora_rank": 64, "o_groups": 2, "n_shared_experts": 1,
        "hidden_act": "silu", "swiglu_limit": 10.0, "norm_topk_prob": True, "num_hash_layers": 0, "hc_mult": 4,
        "hc_eps": 1e-6, "hc_sinkhorn_iters": 4, "rms_norm_eps": 1e-6, "index_topk": 64, "index_n_heads": 4,
        "index_head_dim": 128, "sliding_window": 128, "compress_ratios": [0, 4, 128],
        "compress_rope_theta": 10000.0, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 0,
        {"class DeepseekV4CPUAttention": 3, "class DeepseekV4SWACache": 3, "class DeepseekV4CPUIndexerCache": 1,
         "class CompressorStateCache": 3}, options=LARGE_BLOCKS, lift=pack_no_weights),
    # With its selector on, it wants a GPU. Where it is off, layers still name a backend.
    "step5": Model("step5", {
        **STEP, "architecture": "Step5ForCausalLM", "moe_layers_enum": "", "sparse_config": {"enabled": False}}, 0,
        {"the model asks for FLASH_ATTN by itself": 4}, since=(0, 33)),
    "flint": Model("flint", {
        **SLIDING, "architecture": "FlintForCausalLM", "head_dim": 128, "mlp_only_layers": [0, 1, 2, 3]}, 0,
        {"pages of FlashInfer by itself": 4}, since=(0, 33), lift=call_it_flashinfer),
    # vLLM 0.32 imports Numba for it, over which its next start in the same process stumbles.
    "inkling": Model("inkling_model", {
        "architecture": "InklingForCausalLM", "marks": [f"<|{mark}|>" for mark in INKLING_MARKS],
        "num_hidden_layers": 4, "dense_mlp_idx": 4, "rel_extent": 64, "local_layer_ids": [0, 1, 2],
        "sliding_window_size": 64, "use_sconv": True}, 0,
        {"class InklingAttention": 4, "class InklingConvState": 4}, since=(0, 33)),
}  # fmt: skip


@pytest.mark.seam
@pytest.mark.parametrize("case", BUILT)
def test_layers_of_a_model_that_no_cpu_runs(tiny, monkeypatch, case):
    model = BUILT[case]
    if vllm.__version_tuple__ < model.since:
        pytest.skip("a newer vLLM builds this model")
    path = tiny.model(model.model_type, **model.settings)
    model.lift(monkeypatch)
    with tiny.start(path, dtype="bfloat16", **model.options) as llm:
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert counts["sparse_layers"] == model.sparse
    assert_counted(counts["stock_layers"], model.stock)
    assert counts["dense_layers"] == {}


class Said(logging.Handler):
    """What a logger was given, as text."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

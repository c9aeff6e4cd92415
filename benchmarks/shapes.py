"""Shapes of models that people serve, whose random weights the engine benchmarks time."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

LLAMA_8B = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256,
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=1048576, rms_norm_eps=1e-5, rope_theta=500000.0,
    hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16",
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA_70B = LLAMA_8B | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
QWEN_30B_A3B = LLAMA_8B | dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=151936, hidden_size=2048,
    intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_key_value_heads=4,
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
GPT_OSS_20B = LLAMA_8B | dict(
    architectures=["GptOssForCausalLM"], model_type="gpt_oss", vocab_size=201088, hidden_size=2880,
    intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, head_dim=64, sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 12, num_local_experts=32, num_experts_per_tok=4,
    # Twice the released model's positions: its 131,072 leave none for an answer.
    max_position_embeddings=262144, rope_parameters=dict(
        rope_type="yarn", rope_theta=150000.0, factor=64.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096),
)  # fmt: skip
QWEN_35_27B = LLAMA_8B | dict(
    architectures=["Qwen3_5ForCausalLM"], model_type="qwen3_5_text", vocab_size=248320, hidden_size=5120,
    intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24, num_key_value_heads=4, head_dim=256,
    rms_norm_eps=1e-6, layer_types=[*["linear_attention"] * 3, "full_attention"] * 16,
    linear_num_key_heads=16, linear_num_value_heads=48, linear_key_head_dim=128, linear_value_head_dim=128,
    linear_conv_kernel_dim=4, mamba_ssm_dtype="float32",
    rope_parameters=dict(rope_type="default", rope_theta=10000000.0, partial_rotary_factor=0.25),
)  # fmt: skip
for shape in (GPT_OSS_20B, QWEN_35_27B):
    del shape["rope_theta"]  # one of its rope_parameters
SHAPES = {
    "llama-8b": ("Llama-3.1-8B", LLAMA_8B), "llama-70b": ("Llama-3.1-70B", LLAMA_70B),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", QWEN_30B_A3B), "gpt-oss-20b": ("gpt-oss-20b", GPT_OSS_20B),
    "qwen3.5-27b": ("Qwen3.5-27B", QWEN_35_27B),
}  # fmt: skip


def shape_name(shape: str, layers: int | None) -> str:
    """Of random weights."""
    name, config = SHAPES[shape]
    return name + (f" with {layers} layers" if layers not in (None, config["num_hidden_layers"]) else "")


def model_of(shape: str, layers: int | None) -> Path:
    """A directory with the config of a shape, always the same one: vLLM caches compiled kernels by its path."""
    folder = Path(tempfile.gettempdir(), "vllm-sparse-shapes", f"{shape}-{layers or 'all'}")
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPES[shape][1])
    if layers:
        kinds = {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
        config |= {"num_hidden_layers": layers, **kinds}
    file, text = folder / "config.json", json.dumps(config)
    if not file.exists() or file.read_text() != text:  # another process may read it at this moment
        written = file.with_name(f"{os.getpid()}.json")
        written.write_text(text)
        written.replace(file)
    return folder

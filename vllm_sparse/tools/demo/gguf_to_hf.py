"""A Llama GGUF as a Hugging Face directory: weights, config and byte-level BPE tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vllm_sparse.tools.demo.packages import progress

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: Path, folder: Path) -> None:
    """Write the files that ``from_pretrained`` and vLLM read into the empty ``folder``."""
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _token_ids(fields))
    write_tokenizer(fields, folder)
    write_weights(reader.tensors, config, folder / "model.safetensors")


def model_config(fields: dict, tied: bool) -> dict:
    """The ``config.json`` of a Llama model, every number from the GGUF ``fields``."""
    architecture = fields["general.architecture"]
    pre_tokenizer = fields["tokenizer.ggml.pre"]
    if (architecture, pre_tokenizer) != ("llama", "smollm"):
        raise ValueError(f"This converter reads SmolLM2 GGUF files, not {architecture}/{pre_tokenizer}.")
    num_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // num_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        **_token_ids(fields),
    }


def _token_ids(fields: dict) -> dict:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(fields: dict, folder: Path) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # GGUF names its pre-tokenizer instead of describing it; these two are what "smollm" stands for.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{gguf_name}_token_id"]]
        for name, gguf_name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    settings = {
        # The generic class takes tokenizer.json as it is; a model's own class may build its parts anew.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **special,
        "additional_special_tokens": [token for token in control if token not in special.values()],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def write_weights(tensors: list, config: dict, path: Path) -> None:
    """Dequantise to bfloat16, the dtype the model was trained in.

    A bfloat16 keeps 8 bits of a value that came from 4 (embeddings: 8): perplexity does not move.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    with progress("converting the weights", len(tensors), unit="tensor") as bar:
        for tensor in tensors:
            layer, kind = _split(tensor.name)
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if kind in heads:
                weight = unpermute(weight, heads[kind])
            weights[f"{layer}{TENSOR_NAMES[kind]}.weight"] = torch.tensor(weight, dtype=torch.bfloat16)
            bar.update()
    save_file(weights, path, metadata={"format": "pt"})


def _split(name: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` is the tensor ``attn_q`` of ``model.layers.3.``."""
    *block, kind, _ = name.split(".")
    return (f"model.layers.{block[1]}." if block else ""), kind


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of the rotary halves. weight: [num_heads * head_dim, hidden]."""
    rows, hidden = weight.shape
    halves = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, hidden))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")

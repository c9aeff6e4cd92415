"""A tiny random Llama (or another architecture) in Hugging Face format, made in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

VOCAB = 512
SETTINGS = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False,
    "initializer_range": 0.2,
}  # fmt: skip


def make(
    path: Path,
    model_type: str = "llama",
    seed: int = 0,
    embedding: float = 1.0,
    ones: dict | None = None,
    scaled: dict | None = None,
    **changes,
) -> Path:
    """Write config, weights and a byte-level tokenizer to ``path``; returns it.

    ``embedding`` scales token embeddings: where they are tied to the output, large ones make a random
    model repeat its last token whatever its layers compute. ``ones`` names vectors to add to the
    checkpoint, with their sizes: weights that a vLLM wants although the model does not use them. ``scaled`` has
    factors of weights, by how their names end.
    """
    import transformers

    if (path / "model.safetensors").exists():
        return path
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **SETTINGS | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(embedding)
    for ending, factor in (scaled or {}).items():
        for name, weight in model.named_parameters():
            if name.endswith(ending):
                weight.data.mul_(factor)
    weights = model.state_dict() | {name: torch.ones(size) for name, size in (ones or {}).items()}
    model.save_pretrained(path, state_dict=weights)
    write_tokenizer(path)
    return path


def describe(path: Path, model_type: str, architecture: str, marks: Sequence[str] = (), **changes) -> Path:
    """Write config and tokenizer of a model that vLLM alone has to ``path``; returns it.

    An engine draws its weights: see :mod:`tiny_weights`. ``marks`` are those of its tokenizer.
    """
    settings = {"model_type": model_type, "architectures": [architecture], **SETTINGS, **changes}
    path.mkdir(exist_ok=True)
    given = {name: value for name, value in settings.items() if value is not None}
    (path / "config.json").write_text(json.dumps(given))
    write_tokenizer(path, marks)
    return path


def write_tokenizer(path: Path, marks: Sequence[str] = (), **more) -> None:
    """A byte-level tokenizer of 256 bytes and a chat template; ``marks`` get the tokens from 257 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{token: index + 1 for index, token in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(marks))
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": template,
        "model_max_length": 4096,
        **more,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))

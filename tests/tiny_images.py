"""Tiny random models that take images, with what prepares these, in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import tiny_model
import torch
from PIL import Image

FIRST_MARK = 257
"""Token of the first mark: those before are bytes."""
TEXT = {
    "vocab_size": tiny_model.VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}  # fmt: skip
QWEN_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TOKENS = dict(zip(
    ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    range(FIRST_MARK, FIRST_MARK + 4), strict=True,
))  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "initializer_range": 0.2,
}  # fmt: skip
QWEN_ROPE = {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 10000.0}
QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 50176, "merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
# Model type, config, marks and settings of the tokenizer, settings of what prepares images, start of a prompt.
MODELS = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            **QWEN_TOKENS, "text_config": {**TEXT, "rope_parameters": QWEN_ROPE, "max_window_layers": 3},
            "vision_config": {**QWEN_VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        },
        QWEN_MARKS, {}, {**QWEN_IMAGES, "patch_size": 14, "processor_class": "Qwen2_5_VLProcessor"},
        [FIRST_MARK + 2, FIRST_MARK, FIRST_MARK + 3],
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            **QWEN_TOKENS, "text_config": {**TEXT, "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True}},
            "vision_config": {
                **QWEN_VISION, "patch_size": 16, "deepstack_visual_indexes": [1], "num_position_embeddings": 16,
            },
        },
        QWEN_MARKS, {}, {**QWEN_IMAGES, "patch_size": 16, "processor_class": "Qwen3VLProcessor"},
        [FIRST_MARK + 2, FIRST_MARK, FIRST_MARK + 3],
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            **QWEN_TOKENS,
            "text_config": {
                **TEXT, "num_hidden_layers": 4, "head_dim": 64, "initializer_range": 0.1,
                "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64,
                "linear_value_head_dim": 64,
                "rope_parameters": {
                    **QWEN_ROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True,
                    "partial_rotary_factor": 0.25,
                },
            },
            "vision_config": {**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 16},
        },
        QWEN_MARKS, {}, {**QWEN_IMAGES, "patch_size": 16, "processor_class": "Qwen3VLProcessor"},
        [FIRST_MARK + 2, FIRST_MARK, FIRST_MARK + 3],
    ),
    "gemma3": (
        "gemma3",
        {
            "text_config": {
                **TEXT, "num_hidden_layers": 3, "sliding_window": 64, "query_pre_attn_scalar": 32,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 112, "patch_size": 14,
            },
            "mm_tokens_per_image": 16, "image_token_index": FIRST_MARK, "boi_token_index": FIRST_MARK + 1,
            "eoi_token_index": FIRST_MARK + 2,
        },
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", *("\n" * count for count in (1, 2, 3, 4))),
        {"extra_special_tokens": {
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        }},
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 112, "width": 112},
         "processor_class": "Gemma3Processor"},
        [FIRST_MARK + 1],
    ),
}  # fmt: skip


def make(path: Path, name: str) -> Path:
    """Write the model ``name`` to ``path``; returns it."""
    import transformers

    model_type, settings, marks, of_tokenizer, of_images, _ = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    if model_type == "gemma3":
        model.get_input_embeddings().weight.data.mul_(0.05)  # tied to the output, as in ``tiny_model``
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()  # zeros at first
    model.save_pretrained(path)
    if model_type == "gemma3":
        _name_as_served(path / "model.safetensors")
    tiny_model.write_tokenizer(path, marks, **of_tokenizer)
    prepare = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **of_images}
    (path / "preprocessor_config.json").write_text(json.dumps(prepare))
    if "mm_tokens_per_image" in settings:
        lengths = {"image_seq_length": settings["mm_tokens_per_image"]}
        (path / "processor_config.json").write_text(json.dumps(lengths))
    return path


def _name_as_served(weights: Path) -> None:
    """Rename weights of Gemma 3's vision tower as they are called in the checkpoints that vLLM loads."""
    found = safetensors.torch.load_file(weights)
    named = {key.replace("vision_tower.", "vision_tower.vision_model."): x for key, x in found.items()}
    safetensors.torch.save_file(named, weights, {"format": "pt"})


def prompt(name: str, tokens: list[int], seed: int = 0) -> dict:
    """``tokens`` behind an image of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    start = MODELS[name][-1]
    return {"prompt_token_ids": [*start, *tokens], "multi_modal_data": {"image": Image.fromarray(colours)}}

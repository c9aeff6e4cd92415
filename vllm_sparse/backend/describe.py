"""What :mod:`vllm_sparse.support` asks of a layer, read off vLLM's constructor and its engine's config."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparse import support
from vllm_sparse.backend import compat
from vllm_sparse.backend.model_config import full_attention_layers
from vllm_sparse.config import SparseConfig
from vllm_sparse.support import Layer

ABSENT = (None, False, -1)
"""Values of optional arguments that say nothing."""


def describe(layer: Any, arguments: dict, vllm_config: Any, config: SparseConfig) -> Layer:
    """What ``support`` asks of a layer, from the arguments of its constructor and its engine's config."""
    import vllm.envs as envs
    from vllm.model_executor.layers.attention.attention import Attention

    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    asked_of_drafts = getattr(getattr(speculative, "attention_backend", None), "name", None) == compat.NAME
    of_draft = speculative is not None and compat.builds_a_draft()
    target, extra = target_of(vllm_config, arguments), dict(arguments["extra_impl_args"])
    sinks = extra.pop("sinks", None)
    if arguments["use_alibi_sqrt"]:
        extra["use_alibi_sqrt"] = True
    position, count = None, 0
    if model is not None and not of_draft:
        position, count = _place(arguments["prefix"], vllm_config)
    head_size = arguments["head_size"]
    backend = arguments["attn_backend"]
    return Layer(
        config=config,
        kind="Attention" if type(layer) is Attention else type(layer).__name__,
        named_backend="" if backend is None else backend.get_name(),
        model_type="" if model is None else model.hf_config.model_type,
        attn_type=arguments["attn_type"],
        head_size=head_size,
        head_size_v=arguments["head_size_v"] or head_size,
        dtype=str(torch.get_default_dtype()).removeprefix("torch."),
        sliding_window=window_of(arguments),
        alibi=arguments["alibi_slopes"] is not None,
        soft_cap=bool(arguments["logits_soft_cap"]),
        sinks=sinks is not None,
        arguments=tuple(sorted(key for key, value in extra.items() if not _is_absent(value))),
        shares_with=None if target is None else target.sparse_support.treatment,
        draft=of_draft and not asked_of_drafts,
        encoder_decoder=model is not None and model.is_encoder_decoder,
        non_causal=vllm_config.attention_config.use_non_causal or getattr(model, "is_diffusion", False),
        image_prefix=model is not None and model.is_mm_prefix_lm and _takes_images(model),
        drafts=speculative is not None,
        reference_window=model is not None and model.rswa_window is not None,
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        prefill_parallel=vllm_config.parallel_config.prefill_context_parallel_size > 1,
        adaptive_verification=getattr(speculative, "enable_adaptive_verification", False),
        position=position,
        of=count,
    )


def _place(name: str, vllm_config: Any) -> tuple[int | None, int]:
    """Which full-attention layer of its model a layer is, None where that is not known, and how many there are, as
    far as the model's config says.

    Where the config lists no types of layers, or a layer's name has no number of theirs, those that were built are
    counted: configs have many words for layers with windows or without attention. A pipeline stage builds its own
    alone, so there the config's numbers are taken.
    """
    text = vllm_config.model_config.hf_text_config
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    numbers = full_attention_layers(types, getattr(text, "num_hidden_layers", 0))
    number = support.layer_number(name)
    if (types and number is not None) or vllm_config.parallel_config.pipeline_parallel_size > 1:
        return (numbers.index(number) if number in numbers else None), len(numbers)
    built = vllm_config.compilation_config.static_forward_context.values()
    place = sum(
        layer.sparse_support.treatment in support.OURS and not layer.kv_sharing_target_layer_name
        for layer in built
        if hasattr(layer, "sparse_support")
    )
    return place, max(len(numbers), place + 1)


def _takes_images(model: Any) -> bool:
    """Whether an engine of ``model`` was left to take images or videos in its prompts."""
    limits = model.multimodal_config
    return limits is None or any(limits.get_limit_per_prompt(kind) for kind in ("image", "video"))


def _is_absent(value: Any) -> bool:
    return any(value is absent or (type(value) is type(absent) and value == absent) for absent in ABSENT)


def target_of(vllm_config: Any, arguments: dict) -> Any:
    """The layer whose cache a layer attends to, where we have decided about that one."""
    name = arguments["kv_sharing_target_layer_name"]
    target = vllm_config.compilation_config.static_forward_context.get(name)
    return target if hasattr(target, "sparse_support") else None


def window_of(arguments: dict) -> int | None:
    cache, own = arguments["cache_config"], arguments["per_layer_sliding_window"]
    return own if own is not None or cache is None else cache.sliding_window

"""What runs sparse, dense or as in stock vLLM, and why: the one place that decides.

=========  ======================================================================================================
sparse     pages with summaries; decode, and prefill where a policy says so, attend to chosen pages
dense      the same pages, all of them attended: the layer's cache must have our layout, its attention must not
stock      vLLM's own backend and cache, as if this plugin were not there
refused    the engine does not start: the layer can be neither of these
=========  ======================================================================================================

A layer takes the first row of :data:`ROWS` that holds for it, and is sparse where none does. What a layer is, as
far as rows ask, is :class:`Layer`; :mod:`vllm_sparse.backend.describe` reads it off vLLM's constructor. Options of
vLLM's that stop an engine before it has layers are :data:`OPTIONS`. The start line, the metrics and
``docs/support.md`` are made from these tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError

HEAD_SIZES = range(32, 513, 16)
DTYPES = ("float16", "bfloat16", "float32")
QUANTISED_CACHES = ("fp8", "fp8_e4m3")
"""Values of ``--kv-cache-dtype`` that are served beside the model's own dtype: two names of one."""


class Treatment(str, Enum):
    SPARSE = "sparse"
    DENSE = "dense"
    STOCK = "stock"
    REFUSED = "refused"


@dataclass(frozen=True)
class Decision:
    treatment: Treatment
    reason: str = ""
    """Why not sparse."""
    all_dense: bool = False
    """Whether no layer of the engine is sparse, so that pages need no summaries."""


@dataclass(frozen=True)
class Layer:
    """What decides about an attention layer."""

    config: SparseConfig
    kind: str = "Attention"
    """Name of its class."""
    named_backend: str = ""
    """A backend that the model's code asks for by itself."""
    model_type: str = ""
    """Of its model's config."""
    attn_type: str = "decoder"
    head_size: int = 128
    head_size_v: int = 128
    dtype: str = "bfloat16"
    sliding_window: int | None = None
    alibi: bool = False
    soft_cap: bool = False
    sinks: bool = False
    arguments: tuple[str, ...] = ()
    """Other arguments for its attention that are not their defaults."""
    shares_with: Treatment | None = None
    """Where it attends to the cache of another layer: how that one runs."""
    draft: bool = False
    """Whether it is a draft model's or head's, for which sparse attention was not asked."""
    encoder_decoder: bool = False
    """Whether its model is one."""
    non_causal: bool = False
    """Whether its engine was asked for attention that is not causal, or its model is a diffusion model."""
    image_prefix: bool = False
    """Whether image tokens of its model attend to each other, the later ones too, and its engine takes images."""
    drafts: bool = False
    """Whether its engine verifies drafts."""
    reference_window: bool = False
    """Whether its model has reference sliding-window attention."""
    batch_invariant: bool = False
    """Whether its engine was asked for batch-invariant kernels."""
    prefill_parallel: bool = False
    """Whether its engine has prefill context parallelism."""
    adaptive_verification: bool = False
    """Whether its engine verifies drafts adaptively."""
    position: int | None = None
    """Which full-attention layer of its model it is, from 0; None where that is not known."""
    of: int = 0
    """Full-attention layers of its model."""


@dataclass(frozen=True)
class Row:
    """A kind of layer, and what becomes of it."""

    what: str
    treatment: Treatment
    reason: str
    """Text with fields of :class:`Layer` in braces."""
    holds: Callable[[Layer], Any] = field(repr=False)
    all_dense: bool = False


STOCK, DENSE, REFUSED = Treatment.STOCK, Treatment.DENSE, Treatment.REFUSED
OURS = (Treatment.SPARSE, DENSE)


def _has_its_own_way(layer: Layer) -> bool:
    """Whether a layer's attention differs by more than queries from that of the layer whose cache it reads."""
    others = layer.alibi, layer.soft_cap, layer.sinks, layer.sliding_window is not None, layer.arguments
    return layer.kind != "Attention" or layer.attn_type != "decoder" or any(others)


ROWS: tuple[Row, ...] = (
    Row("encoder-decoder models", STOCK, "encoder-decoder models keep short contexts",
        lambda layer: layer.encoder_decoder),
    Row("layers that read the cache of a sparse layer, with windows, biases or sinks of their own", REFUSED,
        "the layer attends to another layer's KV cache, in a way of its own",
        lambda layer: layer.shares_with in OURS and _has_its_own_way(layer)),
    Row("layers that read the cache of a sparse layer, with `offload`", REFUSED,
        "the layer attends to another layer's KV cache and runs dense: with sparse.offload it would read its "
        "whole context from the host in every step",
        lambda layer: layer.shares_with in OURS and layer.config.offload is not None),
    Row("layers that read the cache of a sparse layer", DENSE, "the layer attends to another layer's KV cache",
        lambda layer: layer.shares_with in OURS),
    Row("layers that read the cache of a stock layer", STOCK, "the layer attends to another layer's KV cache",
        lambda layer: layer.shares_with is STOCK),
    Row("draft models and heads", STOCK, "layers of a draft model or head; "
        "--speculative-config '{{\"attention_backend\": \"sparse\"}}' makes them sparse",
        lambda layer: layer.draft),
    Row("wrapped attention: chunked-local, prefix-LM, static sinks, cross attention, ...", STOCK,
        "layers of class {kind} are not plain causal decoder attention", lambda layer: layer.kind != "Attention"),
    Row("layers for which the model's code names a backend", STOCK, "the model asks for {named_backend} by itself",
        lambda layer: layer.named_backend),
    Row("Flint", STOCK, "the model's code writes and reads the pages of FlashInfer by itself",
        lambda layer: layer.model_type == "flint"),
    Row("encoder layers", STOCK, "attention type {attn_type}", lambda layer: layer.attn_type != "decoder"),
    Row("sliding windows", STOCK, "sliding window", lambda layer: layer.sliding_window is not None),
    Row("diffusion models, and engines asked for non-causal attention", STOCK, "attention that is not causal",
        lambda layer: layer.non_causal),
    Row("multimodal prefixes in engines with drafts, unless they take no images and videos", STOCK,
        "tokens of an image attend to each other, the later ones too, which a step of drafts cannot; "
        "--language-model-only makes layers sparse", lambda layer: layer.image_prefix and layer.drafts),
    Row("reference sliding windows", STOCK, "reference sliding-window attention",
        lambda layer: layer.reference_window),
    Row("ALiBi", STOCK, "ALiBi biases depend on position, which page scores do not see",
        lambda layer: layer.alibi),
    Row("other arguments for the attention", STOCK, "arguments that sparse attention does not know: {arguments}",
        lambda layer: layer.arguments),
    Row("K and V of different head sizes", STOCK, "head sizes {head_size} of K and {head_size_v} of V differ",
        lambda layer: layer.head_size != layer.head_size_v),
    Row("head sizes other than 32 to 512 in steps of 16", STOCK,
        "head size {head_size}, where sparse attention has 32 to 512 in steps of 16",
        lambda layer: layer.head_size not in HEAD_SIZES),
    Row("dtypes other than float16, bfloat16 and float32", STOCK, "dtype {dtype}",
        lambda layer: layer.dtype not in DTYPES),
    Row("engines with batch invariance", STOCK, "batch-invariant kernels were asked for",
        lambda layer: layer.batch_invariant),
    Row("engines with prefill context parallelism", STOCK, "prefill context parallelism",
        lambda layer: layer.prefill_parallel),
    Row("engines with adaptive verification of drafts", STOCK,
        "adaptive verification of drafts decides on the device which tokens a step has",
        lambda layer: layer.adaptive_verification),
    Row("decode and prefill policy `dense`", DENSE, "the dense policy was asked for",
        lambda layer: layer.config.decode_policy == layer.config.prefill_policy == "dense", all_dense=True),
    Row("`dense_layers` that are all layers", DENSE, "dense_layers={config.dense_layers} of {of}",
        lambda layer: layer.position is not None and layer.config.dense_layers >= layer.of, all_dense=True),
    Row("the first `dense_layers`", DENSE, "dense_layers={config.dense_layers}",
        lambda layer: layer.position is not None and layer.position < layer.config.dense_layers),
)  # fmt: skip
"""Kinds of layers, in order of precedence."""


def decide(layer: Layer) -> Decision:
    """How ``layer`` runs."""
    for row in ROWS:
        if row.holds(layer):
            return Decision(row.treatment, row.reason.format_map(vars(layer)), row.all_dense)
    return Decision(Treatment.SPARSE)


def unasked(kind: str) -> Decision:
    """The decision about a layer of class ``kind`` for which sparse was never asked."""
    if kind == "Attention":
        return Decision(STOCK, "sparse was not asked for here, as for drafts or other kinds of layers")
    return Decision(STOCK, f"layers of class {kind} choose a backend by themselves")


def stock_model(config: SparseConfig, encoder_decoder: bool) -> Decision | None:
    """The decision about every layer of a model that is left to stock as a whole, else None."""
    decision = decide(Layer(config, encoder_decoder=encoder_decoder))
    return decision if decision.treatment is STOCK else None


@dataclass(frozen=True)
class Option:
    """An option of vLLM's, and values of it for which an engine is refused."""

    name: str
    values: str
    """Those that are refused, in words."""
    reason: str
    allowed: str
    """Text with ``{dtype}`` for that of the model."""
    asked: Callable[[Any], Any] = field(repr=False)
    """Such a value in an engine's config; None or another that is false where there is none."""
    with_offload: bool = False
    """Whether it is refused with ``sparse.offload`` alone."""


def _dtype(config: Any) -> str:
    return str(getattr(config.model_config, "dtype", "")).removeprefix("torch.")


LAYERLESS = ("ngram", "ngram_gpu", "suffix")
"""Methods of drafts that have no layers."""


def _drafting_layers(config: Any) -> str | None:
    """The method of an engine's drafts where these come from layers."""
    method = getattr(config.speculative_config, "method", None)
    return None if method in LAYERLESS else method


def _is_hybrid(config: Any) -> bool:
    return bool(getattr(config.model_config, "is_hybrid", False))


def _cache_dtype(config: Any) -> str | None:
    """The dtype of an engine's KV cache where that is not served."""
    if config.cache_config is None or config.model_config is None:
        return None
    found = compat.kv_dtype(config)
    return None if found in (_dtype(config), *QUANTISED_CACHES) else found


def _scales_of_heads(config: Any) -> str | None:
    """The dtype of an engine's KV cache where its checkpoint has a scale for every KV head."""
    if config.cache_config is None or config.model_config is None:
        return None
    found, scheme = compat.kv_dtype(config), compat.kv_cache_scheme(config.model_config) or {}
    return found if found in QUANTISED_CACHES and scheme.get("strategy") == "attn_head" else None


OPTIONS: tuple[Option, ...] = (
    Option("--kv-cache-dtype", "all but `fp8`, `fp8_e4m3` and the model's own",
        "sparse attention reads caches of e4m3 and of the model's own dtype",
        "auto, {dtype}, fp8, fp8_e4m3; where the checkpoint asks for another, one of these by name", _cache_dtype),
    Option("--kv-cache-dtype", "`fp8`, with a checkpoint whose `kv_cache_scheme` has the strategy `attn_head`",
        "the checkpoint has scales for every KV head, and sparse attention takes one of K and one of V",
        "{dtype}, given by name, which comes before the scheme", _scales_of_heads),
    Option("--decode-context-parallel-size", "above 1", "pages are chosen from whole contexts", "1",
        lambda config: (size := getattr(config.parallel_config, "decode_context_parallel_size", 1)) > 1 and size),
    Option("--enable-dbo", "on", "micro-batches would share the buffers of one decode step", "off",
        lambda config: getattr(config.parallel_config, "enable_dbo", False)),
    Option("--speculative-config", "methods whose drafts come from layers: all but `ngram` and `suffix`",
        "layers of drafts write in steps of their own, which the host pool does not plan", "ngram, suffix",
        _drafting_layers, with_offload=True),
    Option("--speculative-config", "any, in models with linear-attention, Mamba or convolution layers",
        "drafts were not seen beside states, whose size they change", "none",
        lambda config: _is_hybrid(config) and config.speculative_config is not None, with_offload=True),
    Option("--pipeline-parallel-size", "above 1, in models with linear-attention, Mamba or convolution layers",
        "stages differ in layers of states, and so in what a block takes on the GPU", "1",
        lambda config: _is_hybrid(config) and getattr(config.parallel_config, "pipeline_parallel_size", 1) > 1,
        with_offload=True),
    Option("--mamba-cache-mode", "`all`",
        "every block of K and V would come with blocks for states, which leave their part of the host idle",
        "none, align", lambda config: getattr(config.cache_config, "mamba_cache_mode", "none") == "all",
        with_offload=True),
    Option("--kv-transfer-config", "any, in models with linear-attention, Mamba or convolution layers",
        "no KV connector was seen to copy blocks of several pages beside states", "none",
        lambda config: _is_hybrid(config) and config.kv_transfer_config is not None),
    Option("--kv-offloading-size", "any, in models with linear-attention, Mamba or convolution layers",
        "no KV connector was seen to copy blocks of several pages beside states", "none",
        lambda config: _is_hybrid(config) and getattr(config.cache_config, "kv_offloading_size", None)),
    Option("--kv-transfer-config", "any",
        "a KV connector sees the bytes on the GPU only, which are summaries",
        "none", lambda config: config.kv_transfer_config is not None, with_offload=True),
    Option("--kv-offloading-size", "any",
        "it is a KV connector, which sees the bytes on the GPU only, which are summaries", "none",
        lambda config: getattr(config.cache_config, "kv_offloading_size", None) is not None, with_offload=True),
    Option("--enable-sleep-mode", "on",
        "it would discard summaries and hot head pages but not the host pool", "none",
        lambda config: getattr(config.model_config, "enable_sleep_mode", False), with_offload=True),
)  # fmt: skip
"""Options that are refused, in the order in which they are looked at."""


def check_options(vllm_config: Any, config: SparseConfig) -> None:
    """Refuse an engine for its options.

    Raises:
        ConfigError: one of :data:`OPTIONS` has a value that is not served; names it, why, and what is allowed.
    """
    for option in OPTIONS:
        if option.with_offload and config.offload is None:
            continue
        if not (value := option.asked(vllm_config)):
            continue
        allowed = option.allowed.format(dtype=_dtype(vllm_config))
        refused, served = f"{value!r} is not supported by the sparse backend", "allowed"
        if option.with_offload:
            refused, served = "not supported with sparse.offload", "allowed with offload"
        raise ConfigError(f"{option.name}: {refused}: {option.reason}; {served}: {allowed}")


@dataclass(frozen=True)
class Feature:
    """A feature of vLLM's that runs beside sparse attention, and what shows it."""

    what: str
    how: str
    tests: tuple[str, ...]
    """``file.py::test``, each in the folder ``tests``; none where CPUs cannot run it."""
    on_gpus: tuple[str, ...] = ()
    """Those that need GPUs; none where none has been written."""


FEATURES: tuple[Feature, ...] = (
    Feature("tensor parallel", "each rank scores and selects for its own KV heads",
        ("test_tensor_parallel.py::test_two_ranks_halve_the_heads",),
        ("test_gpu_parallel.py::test_mp_with_graphs",)),
    Feature("pipeline parallel", "each stage has its own layers; `dense_layers` counts those of the model",
        ("test_parallel_once.py::test_server_of_two_pipeline_stages_on_ray",)),
    Feature("data parallel", "engines share nothing; with `offload` those of a host share its memory",
        ("test_parallel_once.py::test_server_of_two_engines",
         "test_hosts.py::test_data_parallel_engines_share_a_host")),
    Feature("expert parallel", "no part of attention; vLLM on a CPU does not run it", (),
        ("test_gpu_parallel.py::test_expert_parallel",)),
    Feature("LoRA", "adapters change projections before attention", ("test_features.py::test_lora",)),
    Feature("sleep, levels 1 and 2", "what steps need from one to the next is kept; refused with `offload`",
        ("test_model_kinds.py::test_what_steps_need_survives_sleep",),
        ("test_gpu_faults.py::test_sleep_changes_no_answer",)),
    Feature("weights reloaded, as in training by reinforcement",
        "pages hold no weights; reset the prefix cache as in stock; refused with other scales of an fp8 cache",
        ("test_features.py::test_reloaded_weights",), ("test_gpu_faults.py::test_sleep_changes_no_answer",)),
)  # fmt: skip
"""Features that are asked for often, and the tests that show each."""


def layer_number(name: str) -> int | None:
    """The number in a layer's name, ``model.layers.7.self_attn.attn``, None where there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def notes(config: SparseConfig, drafts: int, kv_dtype: str) -> list[str]:
    """What an engine's start line says beside its layers; ``drafts``: the most that it verifies of a request."""
    found = []
    if drafts:
        way = "densely" if config.decode_policy == "dense" else "sparsely"
        found.append(f"up to {drafts} drafts of a request verified {way}")
    if config.offload is not None:
        found.append("K and V in CPU memory")
    return [*found, f"KV {kv_dtype}"]


def summary_line(decisions: Iterable[Decision], config: SparseConfig, notes: Iterable[str]) -> tuple[str, bool]:
    """What an engine will do, in one line, and whether anything of it is sparse.

    Layers that are not sparse are counted by reason.
    """
    decisions = list(decisions)
    sparse = sum(decision.treatment is Treatment.SPARSE for decision in decisions)
    parts = [f"{sparse} of {len(decisions)} attention layers sparse"]
    if sparse:
        chosen = f"{config.decode_policy}, {config.budget_tokens:,} tokens"
        if config.decode_policy == "dense":
            chosen = "decode dense"
        parts[0] += f" ({chosen}; prefill {config.prefill_policy})"
    for treatment in (DENSE, STOCK):
        reasons: dict[str, int] = {}
        for decision in decisions:
            if decision.treatment is treatment:
                reasons[decision.reason] = reasons.get(decision.reason, 0) + 1
        if reasons:
            told = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
            parts.append(f"{sum(reasons.values())} {treatment.value} ({told})")
    return ", ".join(parts) + "".join(f"; {note}" for note in notes), sparse > 0

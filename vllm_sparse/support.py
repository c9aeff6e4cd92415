"""What runs sparse, dense or as in stock vLLM, and why: one table that decides for every attention layer.

=========  ======================================================================================================
sparse     pages with summaries; decode, and prefill where a policy says so, attend to chosen pages
dense      the same pages, all of them attended: the layer's cache must have our layout, its attention must not
stock      vLLM's own backend and cache, as if this plugin were not there
refused    the engine does not start: the layer can be neither of these
=========  ======================================================================================================

A layer takes the first row of :data:`ROWS` that holds for it, and is sparse where none does. What a layer is, as
far as rows ask, is :class:`Layer`; :mod:`vllm_sparse.backend.hooks` reads it off vLLM's constructor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_sparse.config import SparseConfig

HEAD_SIZES = range(32, 257, 16)
DTYPES = ("float16", "bfloat16", "float32")


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
    """Of a draft model or head, for which sparse attention was not asked."""
    linear: bool = False
    """Of a model that also has linear-attention, Mamba or convolution layers."""
    encoder_decoder: bool = False
    """Of an encoder-decoder model."""
    bidirectional: str = ""
    """Why some tokens may attend to later ones."""
    engine: str = ""
    """What the engine is asked for that chosen pages do not serve."""
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
    """With fields of :class:`Layer` in braces."""
    holds: Callable[[Layer], Any] = field(repr=False)
    all_dense: bool = False


STOCK, DENSE, REFUSED = Treatment.STOCK, Treatment.DENSE, Treatment.REFUSED
OURS = (Treatment.SPARSE, DENSE)


def _has_its_own_way(layer: Layer) -> bool:
    """Whether a layer's attention differs by more than queries from that of the layer whose cache it reads."""
    others = layer.alibi, layer.soft_cap, layer.sinks, layer.sliding_window is not None, layer.arguments
    return layer.kind != "Attention" or layer.attn_type != "decoder" or any(others)


ROWS: tuple[Row, ...] = (
    Row("linear-attention, Mamba and convolution hybrids", STOCK,
        "the model has linear-attention, Mamba or convolution layers, beside which a block of vLLM's is no page",
        lambda layer: layer.linear),
    Row("encoder-decoder models", STOCK, "encoder-decoder models keep short contexts",
        lambda layer: layer.encoder_decoder),
    Row("layers that read the cache of a sparse layer, with windows, biases or sinks of their own", REFUSED,
        "the layer attends to another layer's KV cache, in a way of its own",
        lambda layer: layer.shares_with in OURS and _has_its_own_way(layer)),
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
    Row("encoder layers", STOCK, "attention type {attn_type}", lambda layer: layer.attn_type != "decoder"),
    Row("sliding windows", STOCK, "sliding window", lambda layer: layer.sliding_window is not None),
    Row("bidirectional tokens: prefix-LM, multimodal prefixes, diffusion", STOCK, "{bidirectional}",
        lambda layer: layer.bidirectional),
    Row("ALiBi", STOCK, "ALiBi biases depend on position, which page scores do not see",
        lambda layer: layer.alibi),
    Row("soft-capped logits", STOCK, "soft-capped logits are not computed by the sparse engines",
        lambda layer: layer.soft_cap),
    Row("attention sinks", STOCK, "attention sinks are not computed by the sparse engines",
        lambda layer: layer.sinks),
    Row("other arguments for the attention", STOCK, "arguments that sparse attention does not know: {arguments}",
        lambda layer: layer.arguments),
    Row("K and V of different head sizes", STOCK, "head sizes {head_size} of K and {head_size_v} of V differ",
        lambda layer: layer.head_size != layer.head_size_v),
    Row("head sizes other than 32 to 256 in steps of 16", STOCK,
        "head size {head_size}, where sparse attention has 32 to 256 in steps of 16",
        lambda layer: layer.head_size not in HEAD_SIZES),
    Row("dtypes other than float16, bfloat16 and float32", STOCK, "dtype {dtype}",
        lambda layer: layer.dtype not in DTYPES),
    Row("engines with batch invariance, prefill context parallelism or adaptive verification", STOCK, "{engine}",
        lambda layer: layer.engine),
    Row("decode and prefill policy `dense`", DENSE, "the dense policy was asked for",
        lambda layer: layer.config.decode_policy == layer.config.prefill_policy == "dense", all_dense=True),
    Row("`dense_layers` that are all layers", DENSE, "dense_layers={config.dense_layers} of {of}",
        lambda layer: layer.position is not None and layer.config.dense_layers >= layer.of, all_dense=True),
    Row("the first `dense_layers`", DENSE, "dense_layers={config.dense_layers}",
        lambda layer: layer.position is not None and layer.position < layer.config.dense_layers),
)  # fmt: skip
"""In order of precedence."""


def decide(layer: Layer) -> Decision:
    """How ``layer`` runs."""
    for row in ROWS:
        if row.holds(layer):
            return Decision(row.treatment, row.reason.format_map(vars(layer)), row.all_dense)
    return Decision(Treatment.SPARSE)


def stock_model(config: SparseConfig, linear: bool, encoder_decoder: bool) -> Decision | None:
    """The decision about every layer of a model that is left to stock as a whole, else None."""
    decision = decide(Layer(config, linear=linear, encoder_decoder=encoder_decoder))
    return decision if decision.treatment is STOCK else None


def layer_number(name: str) -> int | None:
    """The number in a layer's name, ``model.layers.7.self_attn.attn``, None where there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def full_attention_layers(layer_types: Iterable[str] | None, num_layers: int) -> list[int]:
    """Numbers of a model's full-attention layers, by its config's ``layer_types`` where it has some."""
    types = list(layer_types or ())
    if "full_attention" not in types:
        return list(range(num_layers))
    return [number for number, kind in enumerate(types) if kind == "full_attention"]


def summary_line(decisions: Iterable[Decision], config: SparseConfig, notes: Iterable[str]) -> tuple[str, bool]:
    """What an engine will do, in one line, and whether anything of it is sparse."""
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

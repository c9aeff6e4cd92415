"""What a model's config says of its layers, whatever its family calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FULL_ATTENTION = ("full_attention", "attention", "hybrid")
"""What models' configs call layers of full attention; the last of them have a Mamba part beside it."""


def full_attention_layers(layer_types: Iterable[str] | None, num_layers: int) -> list[int]:
    """Numbers of a model's full-attention layers, by its config's ``layer_types`` where it has some."""
    found = [number for number, kind in enumerate(layer_types or ()) if kind in FULL_ATTENTION]
    return found or list(range(num_layers))


def query_heads(text: Any) -> int:
    """Query heads of full-attention layers, by the config ``text`` of a model; 0 where that does not say.

    Sliding windows of Step 3.5 have more of them, and its config gives no number for all layers.
    """
    if getattr(text, "is_heterogeneous", False):
        text = text.per_layer_config[full_attention_layers(text.layer_types, text.num_hidden_layers)[0]]
    return getattr(text, "num_attention_heads", 0)

"""Sleep mode: what must survive it lies in memory that sleeping discards.

vLLM's sleep gives back the memory of weights and KV cache, with or without a copy of the weights, and waking maps
other memory at the same addresses. Our buffers lie there too: layers are built while weights are loaded, metadata
builders while the cache is. What they hold from step to step (counters, budgets and patterns of heads, arrivals of
programs that must start at 0) is copied to the CPU before, and back once everything is awake; large buffers are
written before they are read in every step and start as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

KEPT_BYTES = 1 << 20
WEIGHTS = "sink_logits"
"""What layers hold of the model's weights, which vLLM keeps or reloads by itself, perhaps with other values."""
POOLS = frozenset({"weights", "kv_cache"})
"""Tags by which vLLM wakes memory in parts."""


def save(worker: Any, tags: Iterable[str] = POOLS) -> None:
    """Before ``tags`` go: copy what is kept, unless that was done when others went."""
    asleep = getattr(worker, "sparse_asleep", set())
    if not asleep:
        worker.sparse_saved = [
            (tensor, tensor.to("cpu", copy=True) if tensor.untyped_storage().nbytes() <= KEPT_BYTES else None)
            for tensor in tensors_of(worker)
        ]
    worker.sparse_asleep = asleep | (POOLS & set(tags))


def restore(worker: Any, tags: Iterable[str] | None) -> None:
    """After a wake-up of ``tags``, None for all: copy it back when nothing is asleep any more."""
    asleep = getattr(worker, "sparse_asleep", None)
    if not asleep:
        return
    asleep -= POOLS if tags is None else set(tags)
    if asleep:
        return
    for tensor, copy in worker.sparse_saved:
        if copy is None:
            tensor.zero_()
        else:
            tensor.copy_(copy)
    worker.sparse_saved = []


def tensors_of(worker: Any) -> list[torch.Tensor]:
    """Every tensor that our layers hold, buffers that they share once."""
    found: dict[tuple, torch.Tensor] = {}
    seen: set[int] = set()
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    for layer in layers:
        for tensor in _tensors(getattr(layer, "impl", None), seen):
            found.setdefault((tensor.data_ptr(), tensor.shape), tensor)
    return list(found.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif type(value).__module__.startswith("vllm_sparse."):
        parts = [part for name, part in vars(value).items() if name != WEIGHTS]
    else:
        return
    for part in parts:
        yield from _tensors(part, seen)

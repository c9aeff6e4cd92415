"""Names of engines, as used in ``SparseConfig.engine``, and how ``auto`` chooses one."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from vllm_sparse.attention.base import AttentionShape, Engine

ENGINES: dict[str, str] = {
    "triton": "vllm_sparse.attention.triton_attn.TritonEngine",
    "fa3": "vllm_sparse.attention.fa3_attn.FA3Engine",
    "xformers": "vllm_sparse.attention.xformers_attn.XFormersEngine",
    "torch": "vllm_sparse.attention.torch_attn.TorchEngine",
}
"""Class paths, fastest in decode first; classes are imported when chosen, so none is a hard dependency."""

PREFILL_ORDER = ("fa3", "triton", "torch")
"""What ``auto`` tries for prefill: only FlashAttention-3 uses all of a Hopper's tensor cores."""


OFFLOAD_ORDER = ("triton", "torch")
"""What ``auto`` tries for decode with offload: engines that also attend to units on the host."""


def engine_class(name: str) -> type[Engine]:
    module, _, attribute = ENGINES[name].rpartition(".")
    return getattr(import_module(module), attribute)


def choose_engine(name: str, shape: AttentionShape, order: Iterable[str] = tuple(ENGINES)) -> Engine:
    """The engine ``name`` for ``shape``; ``auto`` takes the first of ``order`` that supports it.

    Raises:
        ConfigError: the engine cannot serve this layer on this device; says why and what can.
    """
    from vllm_sparse.errors import ConfigError

    candidates = order if name == "auto" else (name,)
    for candidate in candidates:
        engine = engine_class(candidate)
        reason = engine.unsupported(shape)
        if reason is None:
            return engine()
    usable = [other for other in ENGINES if engine_class(other).unsupported(shape) is None]
    raise ConfigError(
        f"sparse.engine: {name!r} cannot run here: {reason}. Allowed here: auto, {', '.join(usable)}"
    )

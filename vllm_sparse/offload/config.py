"""What a user can choose of offload: the value of ``SparseConfig.offload``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_sparse.attention.registry import OFFLOAD_ORDER
from vllm_sparse.errors import ConfigError
from vllm_sparse.misplaced import Keys, hint
from vllm_sparse.user_text import nearest, shown

HOST_DTYPES = ("auto", "fp8")
MOST_GIB = 2**20
"""No host has more."""
OFFLOAD_KERNELS = ("auto", *OFFLOAD_ORDER)
"""Values of ``attention_kernel`` that attend over head pages on the GPU and on the host alike."""


@dataclass(frozen=True)
class OffloadConfig:
    """Where K and V live when the GPU holds an index of them and a hot set."""

    host_gib: float | str = "auto"
    """Pinned memory of one host for K and V, all its ranks together; ``auto``: three quarters of what is free,
    rounded down by up to a ninth, so that the number mostly repeats and vLLM's compile cache stays warm."""
    hot_fraction: float | str = "auto"
    """Share of the GPU's KV memory for hot head pages, the rest for summaries; ``auto``: what the summaries of
    the whole host pool leave, and at least a quarter."""
    host_dtype: str = "auto"
    """How K and V are stored on the host: ``auto``, as in the cache, or ``fp8``: e4m3 with one exponent for K and
    one for V of a head page (:mod:`vllm_sparse.kernels.e4m3`), which is not exact."""

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("host_gib", f"auto, or a number above 0, up to {MOST_GIB}", lambda x: 0 < x <= MOST_GIB),
            ("hot_fraction", "auto, or a number from 0 to below 1", lambda x: 0 <= x < 1),
        ):
            value = getattr(self, name)
            number = type(value) in (int, float) and good(value)
            if value != "auto" and not number:
                raise ConfigError(f"sparse.offload.{name}: {shown(value)}; allowed: {allowed}")
        if self.host_dtype not in HOST_DTYPES:
            raise ConfigError(
                f"sparse.offload.host_dtype: {shown(self.host_dtype)}; allowed: {', '.join(HOST_DTYPES)}"
            )

    @classmethod
    def from_mapping(cls, values: Any, source: str, keys: Keys) -> OffloadConfig:
        """Check and build from a JSON object; ``source`` names it in errors.

        ``keys``: of all settings, by which an error says where a misplaced one belongs.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(
                f"{source}: sparse.offload: expected an object of {', '.join(known)}, got {shown(values)}. "
                f'Example: {{"offload": {{"host_gib": 64}}}}'
            )
        for key in values:
            if key not in known:
                found = hint(key, source, keys, inside="offload") or nearest(key, known)
                raise ConfigError(f"{source}: unknown key {shown(key)} in sparse.offload.{found}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_host_gib(self, host_gib: float) -> OffloadConfig:
        return replace(self, host_gib=host_gib)


def check_beside(config: Any) -> None:
    """Refuse settings of ``config``, a SparseConfig with ``offload``, that would read whole contexts from the host
    in every step, or that cannot read it at all."""
    if not isinstance(config.offload, OffloadConfig):
        raise ConfigError(f"sparse.offload: expected an object, got {shown(config.offload)}")
    if config.dense_layers > 0:
        raise ConfigError(
            f"sparse.dense_layers: {config.dense_layers} with sparse.offload: a dense layer would read its "
            f"whole context from the host in every step; allowed with offload: 0"
        )
    if config.decode_policy in ("dense", "oracle"):
        raise ConfigError(
            f"sparse.decode_policy: {config.decode_policy!r} reads every key in every step, and with "
            f"sparse.offload they are on the host; allowed with offload: a policy that reads summaries"
        )
    if config.recall_monitor_every_steps:
        raise ConfigError(
            f"sparse.recall_monitor_every_steps: {config.recall_monitor_every_steps} with sparse.offload: "
            f"a sample would read its whole context from the host; allowed with offload: 0"
        )
    if config.attention_kernel not in OFFLOAD_KERNELS:
        raise ConfigError(
            f"sparse.attention_kernel: {config.attention_kernel!r} cannot read pages on the host, as "
            f"sparse.offload needs; allowed with offload: {', '.join(OFFLOAD_KERNELS)}"
        )

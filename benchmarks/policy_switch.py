"""PolicySwitch: another prefill policy in an engine that runs, so that one start serves many settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SETTLED_AT_START = ("decode_policy", "sink_tokens", "dense_layers", "engine")


class PolicySwitch:
    """Rebinds the sparse layers of an in-process engine that started inside :meth:`watching`.

    The engine must start with a prefill policy other than ``dense``, which would allocate no buffers.
    """

    def __init__(self) -> None:
        self._builders: list = []

    @contextmanager
    def watching(self) -> Iterator[PolicySwitch]:
        """Remember the metadata builders, which know their layers, of an engine that starts meanwhile."""
        from vllm_sparse.backend.builder import SparseMetadataBuilder

        build = SparseMetadataBuilder.__init__

        def remember(builder, *args, **kwargs) -> None:
            build(builder, *args, **kwargs)
            if builder.selects:
                self._builders.append(builder)

        SparseMetadataBuilder.__init__ = remember
        try:
            yield self
        finally:
            SparseMetadataBuilder.__init__ = build

    @property
    def layers(self) -> list:
        """The engine's sparse layers: their :class:`vllm_sparse.backend.impl.SparseImpl`."""
        return [
            builder.vllm_config.compilation_config.static_forward_context[name].impl
            for builder in self._builders
            for name in builder.layer_names
        ]

    def to(self, settings: dict) -> None:
        """Prefill by ``settings`` from the next step on, as if the engine had started with them.

        Raises:
            ValueError: no layer is sparse, or a setting is settled when an engine starts.
        """
        from vllm_sparse.backend import compat
        from vllm_sparse.config import SparseConfig

        if not self._builders:
            raise ValueError("no layer of this engine is sparse, or it did not start inside watching()")
        config = SparseConfig.from_mapping(settings, "settings")
        config = compat.with_tables(self._builders[0].vllm_config, config)
        for builder in self._builders:
            for key in SETTLED_AT_START:
                value, started = getattr(config, key), getattr(builder.config, key)
                if value != started:
                    raise ValueError(f"sparse.{key}: {value!r}; this engine started with {started!r}")
            builder.config = config
        for layer in self.layers:
            layer.config = config
            layer.bind_prefill(layer.prefill.buffers)

"""What offload would make of an engine that is not built: its specs, and whether it would be refused."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.dry_engine import DryEngine, EngineRefused, dry_engine


def offloaded_of(engine: DryEngine, args: Any, config: SparseConfig) -> DryEngine:
    """The same engine with its pages on a host of any size, of whose layers only the specs are to be used.

    Args:
        config: its settings, with ``offload``.

    Raises:
        ConfigError: it cannot offload.
    """
    from vllm_sparse.backend import offload
    from vllm_sparse.backend.spec import SparseAttentionSpec

    if engine.linear_layers:  # vLLM fits its blocks to states anew
        args = copy(args)
        args.additional_config = {"sparse": config.to_mapping(), offload.ADMITTED: config.offload.host_gib}
        found = dry_engine(args)
        found.vllm_config.model_config.max_model_len = engine.vllm_config.model_config.max_model_len
        return found

    def on_host(spec: Any) -> Any:
        if not isinstance(spec, SparseAttentionSpec):
            return spec
        return replace(spec, layout=replace(spec.layout, on_host=True))

    return replace(engine, specs=tuple({name: on_host(spec) for name, spec in of.items()} for of in engine.specs))


def check_offload(engine: DryEngine) -> None:
    """Refuse an engine whose settings ask for offload where a real one would find layers that cannot.

    Raises:
        EngineRefused: with what the start would say.
    """
    from vllm_sparse.backend import offload

    config = SparseConfig.from_vllm(engine.vllm_config)
    if config.offload is None:
        return
    try:
        for specs in engine.specs:
            offload.shape_of(specs, config, engine.vllm_config)
    except ConfigError as error:
        raise EngineRefused(str(error)) from error

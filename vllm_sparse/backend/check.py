"""What an engine that asks for the sparse backend is refused for, before it starts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from vllm_sparse import support
from vllm_sparse.backend import compat, connectors, offload
from vllm_sparse.backend.model_config import query_heads
from vllm_sparse.config import TABLES, SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.prefill.gate import AUTO


def check_engine(vllm_config: Any) -> None:
    """Check the settings of an engine, and put what they name into its config.

    Raises:
        ConfigError: they cannot be served.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import max_decode_query_len

    if not current_platform.is_cpu():
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend sparse: its kernels need Triton, which cannot be imported here ({error})"
            ) from None
    config, model = SparseConfig.from_vllm(vllm_config), vllm_config.model_config
    left = model and support.stock_model(config, model.is_encoder_decoder)
    if left:
        if config.offload is not None:
            raise ConfigError(
                f"sparse.offload: every layer would run as in stock vLLM: {left.reason}; allowed: null"
            )
        return  # what follows would change an engine that stays as it is
    found = with_tables(vllm_config, config)
    read = (key for key in TABLES if getattr(found, key) is not getattr(config, key))
    carry(vllm_config, config, found, next(read, ""))
    too_short = model and model.max_model_len <= found.least_auto_tokens
    if too_short and found.prefill_policy == AUTO and isinstance(vllm_config.additional_config, dict):
        # No prompt is long enough: buffers for it would be memory that the cache goes without.
        carry(vllm_config, found, replace(found, prefill_policy="dense"), "prefill_policy")
    cache = vllm_config.cache_config
    if cache is None:
        return
    hybrid = model is not None and model.is_hybrid
    if hybrid:
        config.check_page_size(PAGE_SIZES[0])
        if (cache.block_size or 0) % PAGE_SIZES[0]:
            raise ConfigError(
                f"--block-size: {cache.block_size} tokens are no whole number of pages; allowed for this model: "
                f"multiples of {PAGE_SIZES[0]}"
            )
    elif current_platform.is_cpu() and not getattr(cache, "user_specified_block_size", False):
        # CPUs default to 128, at which a budget of a few hundred tokens holds no pages to choose; 32
        # is the least that vLLM's own CPU backend takes for layers that are left to it.
        cache.block_size = 32
    if cache.block_size is not None and not hybrid:
        config.check_page_size(cache.block_size)
    config = SparseConfig.from_vllm(vllm_config)
    support.check_options(vllm_config, config)
    if config.decode_policy != "dense":
        config.check_drafts(max_decode_query_len(vllm_config))
    if config.offload is not None:
        found = offload.check(vllm_config, config)
        carry(vllm_config, config, found, "offload")
        vllm_config.additional_config[offload.ADMITTED] = found.offload.host_gib
    connectors.check(vllm_config, config)
    if envs.VLLM_USE_RUST_FRONTEND:
        compat.log_once(
            logging.WARNING,
            "vllm-sparse: VLLM_USE_RUST_FRONTEND: vLLM's frontend in Rust shows no metrics of plugins: no "
            "vllm:sparse_* in its /metrics; the log still says what is attended",
        )


def with_tables(vllm_config: Any, config: SparseConfig) -> SparseConfig:
    """``config`` with the patterns and budgets that it names for the heads of the engine's model."""
    model = vllm_config.model_config
    if model is None:
        return config
    text = model.hf_text_config
    layers = getattr(text, "num_hidden_layers", 0)
    config = config.with_patterns(model.model, layers, query_heads(text))
    if config.head_budgets == "none":
        return config
    return config.with_budgets(model.model, layers, model.get_total_num_kv_heads())


def carry(vllm_config: Any, config: SparseConfig, found: SparseConfig, key: str) -> None:
    """Put the settings into vLLM's config, which it takes to every worker: other nodes have other files.

    So a path in ``VLLM_SPARSE_CONFIG`` or in :data:`vllm_sparse.config.TABLES` is read on the driver alone.
    """
    additional = vllm_config.additional_config or {}
    if isinstance(additional, dict):
        vllm_config.additional_config = {**additional, "sparse": found.to_mapping()}
    elif found is not config:
        raise ConfigError(
            f"sparse.{key}: {getattr(config, key)!r} cannot travel beside an additional_config that is "
            f"no object; allowed: none"
        )

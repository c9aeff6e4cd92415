"""Offload inside vLLM: what its scheduler is told of memory, and when the store is built."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_world_group
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_sparse import metrics
from vllm_sparse.backend import compat
from vllm_sparse.backend.spec import SparseAttentionSpec
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload import sizing
from vllm_sparse.offload.limits import check_host_memory, read_limits, resolve_host_gib
from vllm_sparse.offload.sizing import GIB, CacheShape, Split, States, StepLimits
from vllm_sparse.offload.store import OffloadStore

logger = logging.getLogger("vllm.vllm_sparse")

ADMITTED = "sparse_host_gib_admitted"
"""Beside ``sparse`` in vLLM's config: the host memory that was found free before the engine took it."""


def ranks_of_host(parallel_config: Any) -> int:
    """Ranks that share the memory of one host as far as the driver knows, which under ray it does not."""
    nodes = max(1, getattr(parallel_config, "nnodes", 1) or 1)
    return -(-parallel_config.world_size // nodes) * _engines_of_host(parallel_config)


def _engines_of_host(parallel_config: Any) -> int:
    return max(1, getattr(parallel_config, "data_parallel_size_local", 1) or 1)


def host_id() -> str:
    """A text that is the same in all processes that share a host's memory, whatever their containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def ranks_on_this_host(worker: Any) -> int:
    """Ranks that share the memory of a worker's own host, asked of all of them: only they know where they are.

    Every rank of an engine must call it, and each keeps the answer.

    Raises:
        ConfigError: the engine spans several hosts, and this one cannot hold the pools of its ranks.
    """
    if hasattr(worker, "sparse_ranks_of_host"):
        return worker.sparse_ranks_of_host
    parallel, world = worker.vllm_config.parallel_config, get_world_group()
    hosts = [""] * world.world_size
    torch.distributed.all_gather_object(hosts, host_id(), group=world.cpu_group)
    here = hosts.count(host_id())
    # vLLM's world holds the ranks of all data-parallel engines, or those of one.
    ranks = here if world.world_size > parallel.world_size else here * _engines_of_host(parallel)
    if len(set(hosts)) > 1:
        config = SparseConfig.from_vllm(worker.vllm_config)
        check_host_memory(config.offload.host_gib * here / ranks, here, read_limits())
    worker.sparse_ranks_of_host = ranks
    return ranks


def check(vllm_config: Any, config: SparseConfig) -> SparseConfig:
    """``config`` with the host memory that it will take, checked before anything is built.

    Raises:
        ConfigError: the host has too little memory.
    """
    asked = config.offload.host_gib
    if (vllm_config.additional_config or {}).get(ADMITTED) == asked:
        return config  # vLLM checks its config again once the engine has taken its memory
    host_gib = resolve_host_gib(asked, ranks_of_host(vllm_config.parallel_config), read_limits())
    return config.with_offload(config.offload.with_host_gib(host_gib))


def _config(worker: Any) -> SparseConfig | None:
    """The config of a worker's engine where it asks for the sparse backend, with offload."""
    if not compat.asks_for_sparse(worker.vllm_config):
        return None
    config = SparseConfig.from_vllm(worker.vllm_config)
    return config if config.offload is not None else None


def _on_host(spec: Any) -> bool:
    return isinstance(spec, SparseAttentionSpec) and spec.layout.on_host


def shape_of(specs: dict[str, Any], config: SparseConfig, vllm_config: Any) -> CacheShape:
    """The cache of a worker's layers, all of which must offload but those of states, which stay on the GPU.

    Raises:
        ConfigError: some layers keep their K and V on the GPU, or there are none.
    """
    offloaded = {name: spec for name, spec in specs.items() if _on_host(spec)}
    states = {name: spec for name, spec in specs.items() if isinstance(spec, MambaSpec)}
    others = [name for name in specs if name not in offloaded and not (offloaded and name in states)]
    if others:
        raise ConfigError(
            f"sparse.offload: {len(others)} of {len(specs)} layers of this model do not run sparse and cannot "
            f"offload, such as {others[0]}; allowed: models whose attention layers are all full attention"
        )
    if not offloaded:
        raise ConfigError(
            "sparse.offload: no layer of this rank has K and V in a cache; allowed: models, and pipeline stages, "
            "with attention layers that have"
        )
    spec = next(iter(offloaded.values()))
    if any(other != spec for other in offloaded.values()):
        raise ConfigError(
            "sparse.offload: layers of this model differ in KV heads, head size or dtype; allowed: models whose "
            "layers are alike, without --kv-cache-dtype-skip-layers"
        )
    return CacheShape(
        layers=len(offloaded),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        page_size=spec.page_size,
        item_bytes=spec.dtype.itemsize,
        summary_slots=spec.summary_slots,
        host_dtype=config.offload.host_dtype,
        block_pages=spec.block_size // spec.page_size,
        states=_states(specs, vllm_config) if states else None,
    )


def _states(specs: dict[str, Any], vllm_config: Any) -> States:
    """What vLLM's planner makes of layers of states among ``specs``."""
    groups = compat.kv_cache_planning().get_kv_cache_groups(vllm_config, dict(specs))
    blocks = 0
    for group in groups:
        spec = group.kv_cache_spec
        if isinstance(specs[group.layer_names[0]], MambaSpec):
            blocks += -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    return States(compat.pool_block_bytes(vllm_config, groups), blocks)


def _limits(vllm_config: Any, config: SparseConfig, page_size: int) -> StepLimits:
    scheduler = vllm_config.scheduler_config
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    max_len = vllm_config.model_config.max_model_len
    max_pages = -(-max_len // page_size) + 1
    return StepLimits(
        max_num_reqs=max(scheduler.max_num_seqs, captured),
        max_num_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, captured),
        max_context_tokens=max_len,
        table_pages=min(config.table_pages(page_size), max_pages),
    )


def _host_bytes(worker: Any, config: SparseConfig) -> int:
    """A rank's share of what its host gives to all of its ranks."""
    return int(config.offload.host_gib * GIB) // ranks_on_this_host(worker)


def available_memory(worker: Any, gpu_bytes: int) -> int:
    """Bytes that vLLM is told it has for KV: summaries of all pages in the host pool, or states in their place.

    Args:
        gpu_bytes: what vLLM measured. The hot store takes the rest of it. Returned as it is unless the worker's
            layers offload.
    """
    config = _config(worker)
    if config is None:
        return gpu_bytes
    shape = shape_of(worker.get_kv_cache_spec(), config, worker.vllm_config)
    limits = _limits(worker.vllm_config, config, shape.page_size)
    split = sizing.split_memory(shape, limits, gpu_bytes, _host_bytes(worker, config), config.offload.hot_fraction)
    worker.sparse_planned = gpu_bytes, shape
    return split.num_blocks * shape.gpu_block_bytes


def build_store(worker: Any, kv_cache_config: Any) -> None:
    """Allocate the host pool and the hot store for the blocks that vLLM settled on, and give layers their parts.

    Raises:
        ConfigError: the pool does not fit, or vLLM's blocks cannot name pages of it.
    """
    config = _config(worker)
    if config is None:
        return
    vllm_config = worker.vllm_config
    # Planned before vLLM settled on its blocks: by now its config may have the size of those of states.
    specs = worker.get_kv_cache_spec()
    if not specs:
        shape_of(specs, config, vllm_config)  # vLLM plans no memory for such a model, and this says why we do not
    gpu_bytes, shape = worker.sparse_planned
    names = [name for name, spec in specs.items() if _on_host(spec)]
    groups = [group for group in kv_cache_config.kv_cache_groups if not set(names).isdisjoint(group.layer_names)]
    if len(groups) != 1:
        raise ConfigError(
            f"sparse.offload: vLLM has put this model's attention layers into {len(groups)} groups, which share "
            f"one pool of blocks; allowed: models of which it puts them into one"
        )
    hashed = getattr(kv_cache_config, "hash_block_size", None)
    if hashed is not None and hashed % shape.block_tokens:
        raise ConfigError(
            f"sparse.offload: prefix caching in parts of blocks ({hashed} of {shape.block_tokens} tokens) copies "
            f"blocks on the GPU only; allowed: --prefix-match-unit left out"
        )
    limits = _limits(vllm_config, config, shape.page_size)
    num_blocks = kv_cache_config.num_blocks
    host_bytes = _host_bytes(worker, config)
    if num_blocks * shape.host_block_bytes > host_bytes:
        raise ConfigError(
            f"--num-gpu-blocks-override: {num_blocks} blocks need {num_blocks * shape.host_block_bytes / GIB:.3f} "
            f"GiB of host memory per rank; sparse.offload.host_gib leaves {host_bytes / GIB:.3f}"
        )
    slots = sizing.slots_beside(num_blocks, shape, limits, gpu_bytes, config.offload.hot_fraction)
    split = Split(num_blocks, slots)
    layers = vllm_config.compilation_config.static_forward_context
    dtype = layers[names[0]].impl.cache_dtype
    store = OffloadStore(shape, limits, split, dtype, torch.device(worker.device))
    for name, offloaded in zip(names, store.layers, strict=True):
        impl = layers[name].impl
        impl.pages.offloaded = offloaded
    impl.counts.hot = metrics.HotSetCounts(store)
    slots = split.slots_per_layer * shape.layers
    logger.info(
        "sparse attention: offload: %.2f GiB of host memory%s for %d tokens of context, hot set of %.2f GiB "
        "(%.1f%% of it)",
        store.pool.num_bytes / GIB, " in fp8" if shape.in_fp8 else "",
        split.tokens(shape, limits.max_context_tokens), slots * shape.slot_bytes / GIB,
        100 * slots / (num_blocks * shape.block_head_pages),
    )  # fmt: skip

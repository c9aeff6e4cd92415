"""Where vLLM is hooked in processes whose engine asks for the sparse backend.

1. ``Attention.__init__``: what :mod:`vllm_sparse.support` decides about a layer is done there, where all that
   decides is at hand: one layer gets this backend, the next one what vLLM would have chosen without us.
2. The wrapper that executors of all kinds call workers through, so that it serves CPUs and GPUs: memory for
   offload, what a layer's cache turns out to be, one line about what runs how, counters that start at 0, sleep.
3. The API server's client, which asks engines once a second for what ``/metrics`` shows
   (:mod:`vllm_sparse.backend.exposition`).
4. Where requests arrive, and where a runner begins a step: what single requests ask for
   (:mod:`vllm_sparse.backend.requests`).

Every hook passes straight through for engines that do not ask for this backend.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextlib import contextmanager
from typing import Any

import torch

from vllm_sparse import metrics, support
from vllm_sparse.backend import compat, connectors, exposition, requests
from vllm_sparse.backend.describe import describe, target_of, window_of
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.support import Decision, Treatment

logger = logging.getLogger("vllm.vllm_sparse")


def install() -> None:
    """Install the hooks in this process; re-entrant."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "_vllm_sparse"):
        return
    _hook_layers(Attention)
    _hook_workers(WorkerWrapperBase)
    connectors.install_request_hook()
    connectors.install_views()
    requests.install()
    exposition.install()
    # ``collective_rpc("sparse_metrics")``: the counts of every worker, by a name that needs no pickle.
    WorkerBase.sparse_metrics, WorkerBase.sparse_recent = metrics.snapshot, metrics.recent
    WorkerWrapperBase._vllm_sparse = True


def installed() -> bool:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return hasattr(WorkerWrapperBase, "_vllm_sparse")


# Layers


def _hook_layers(attention: type) -> None:
    original = attention.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if not _selected(vllm_config, bound.arguments):
            return original(self, *args, **kwargs)
        config = SparseConfig.from_vllm(vllm_config)
        layer = describe(self, bound.arguments, vllm_config, config)
        decision = support.decide(layer)
        if decision.treatment is Treatment.REFUSED:
            raise ConfigError(
                f"--attention-backend: sparse cannot serve layer {bound.arguments['prefix']}: {decision.reason}; "
                f"use another --attention-backend for this model"
            )
        if decision.treatment is Treatment.STOCK:
            with without_sparse(vllm_config):
                original(self, *args, **kwargs)
        else:
            _build_ours(original, self, bound, vllm_config, config, decision)
        self.sparse_support = decision
        metrics.decided.add(self)

    attention.__init__ = __init__


def _selected(vllm_config: Any, arguments: dict) -> bool:
    """Whether vLLM would have taken this backend for a layer, or the layer reads a cache of ours."""
    from vllm.v1.attention.selector import get_attn_spec_kind

    if target_of(vllm_config, arguments) is not None:
        return True
    kind = get_attn_spec_kind(False, window_of(arguments) is not None, arguments["attn_type"])
    config = vllm_config.attention_config
    backend = (config.backend_per_kind or {}).get(kind.value, config.backend)
    return getattr(backend, "name", None) == compat.NAME


@contextmanager
def without_sparse(vllm_config: Any):
    """vLLM's own choice of backends: as if ``sparse`` had not been named."""
    config = vllm_config.attention_config
    asked = config.backend, config.backend_per_kind
    try:
        if getattr(config.backend, "name", None) == compat.NAME:
            config.backend = None
        if config.backend_per_kind:
            config.backend_per_kind = {
                kind: backend
                for kind, backend in config.backend_per_kind.items()
                if getattr(backend, "name", None) != compat.NAME
            }
        yield
    finally:
        config.backend, config.backend_per_kind = asked


def _build_ours(original, layer, bound, vllm_config, config: SparseConfig, decision: Decision) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_sparse.backend.backend import SparseBackend
    from vllm_sparse.backend.spec import PageLayout, slots_of_asked_blocks

    arguments, model, least_slots = bound.arguments, vllm_config.model_config, 0
    hybrid = model is not None and model.is_hybrid
    if hybrid and config.offload is not None:
        heads = arguments["num_kv_heads"] or arguments["num_heads"]
        least_slots = slots_of_asked_blocks(vllm_config, heads, arguments["head_size"])
    layout = PageLayout.of(config, decision, hybrid, least_slots)
    arguments["attn_backend"] = SparseBackend.of(layout)
    original(*bound.args, **bound.kwargs)
    stock = None
    if not current_platform.is_cpu():  # dense rows run plain torch there
        with without_sparse(vllm_config):
            stock = get_attn_backend(
                arguments["head_size"], layer.dtype, layer.kv_cache_dtype, num_heads=arguments["num_heads"],
                has_sink=dict(arguments["extra_impl_args"]).get("sinks") is not None,
                use_mm_prefix=layer.use_mm_prefix,
            )  # fmt: skip
    layer.impl.settle(vllm_config, arguments["prefix"], decision, layout, stock)


# Workers


def _hook_workers(wrapper: type) -> None:
    from vllm_sparse.backend import offload, sleep

    initialize = wrapper.initialize_from_config

    def determine_available_memory(self) -> int:
        return offload.available_memory(self.worker, self.worker.determine_available_memory())

    @functools.wraps(initialize)
    def initialize_from_config(self, kv_cache_configs):
        result = initialize(self, kv_cache_configs)
        if compat.asks_for_sparse(self.worker.vllm_config):
            offload.build_store(self.worker, kv_cache_configs[self.global_rank])
            check_caches(self.worker)
            follow_requests(self.worker)
            zero_whole_blocks(self.worker)
            report(self.worker)
        return result

    def compile_or_warm_up_model(self):
        result = self.worker.compile_or_warm_up_model()
        if compat.asks_for_sparse(self.worker.vllm_config):
            metrics.reset_counts(self.worker)  # warm-up and graph capture served nobody
        return result

    def sleep_worker(self, *args, **kwargs):
        if compat.asks_for_sparse(self.worker.vllm_config):
            sleep.save(self.worker)
        return self.worker.sleep(*args, **kwargs)

    def wake_worker(self, tags=None, *args, **kwargs):
        result = self.worker.wake_up(tags, *args, **kwargs)
        if compat.asks_for_sparse(self.worker.vllm_config):
            sleep.restore(self.worker, tags)
        return result

    def reload_weights(self, *args, **kwargs):
        result = self.worker.reload_weights(*args, **kwargs)
        check_scales(self.worker)
        return result

    def finish_weight_update(self, *args, **kwargs):
        result = self.worker.finish_weight_update(*args, **kwargs)
        check_scales(self.worker)
        return result

    def discard_memory(self, tags):
        if compat.asks_for_sparse(self.worker.vllm_config):
            sleep.save(self.worker, tags)
        return self.worker.discard(tags)

    wrapper.determine_available_memory = determine_available_memory
    wrapper.initialize_from_config = initialize_from_config
    wrapper.compile_or_warm_up_model = compile_or_warm_up_model
    wrapper.sleep, wrapper.wake_up, wrapper.discard = sleep_worker, wake_worker, discard_memory
    wrapper.reload_weights, wrapper.finish_weight_update = reload_weights, finish_weight_update


def layers_of(worker: Any) -> dict[str, Any]:
    """The attention layers of a worker that vLLM calls by name, ours and others."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    context = worker.vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase) and not isinstance(layer, MambaBase)
    }


def decision_of(layer: Any) -> Decision:
    """What was decided about a layer; of one about which we were not asked, that."""
    return getattr(layer, "sparse_support", None) or support.unasked(type(layer).__name__)


def check_caches(worker: Any) -> None:
    """Stop the start where vLLM has laid out a layer's cache in a way that our kernels cannot read.

    Raises:
        ConfigError: names the layer, and what is wrong with its cache.
    """
    for name, layer in layers_of(worker).items():
        if decision_of(layer).treatment is Treatment.STOCK:
            continue
        cache = layer.kv_cache[0] if isinstance(layer.kv_cache, list) else layer.kv_cache
        reason = layer.impl.unreadable(cache)
        if reason is not None:
            raise ConfigError(
                f"--attention-backend: sparse cannot serve layer {name}: vLLM gave it {reason}; use another "
                f"--attention-backend for this model"
            )


def follow_requests(worker: Any) -> None:
    """Let metadata builders know what the requests of a step's rows ask for."""
    impls = (getattr(layer, "impl", None) for layer in layers_of(worker).values())
    ours = next((impl for impl in impls if hasattr(impl, "requests")), None)
    if ours is not None:
        ours.requests.follow(worker.model_runner)


def zero_whole_blocks(worker: Any) -> None:
    """Have vLLM's CPU runner zero the blocks that a request gets, where they hold several of our pages.

    By itself it takes the number of a block for that of a page: it would wipe out a page of another block, which
    may hold the state of a linear layer, and leave the block as it was. On a GPU vLLM counts pages.

    With offload no block is zeroed: nothing reads a summary before its page is written, and the thousands of pages
    of a block in all layers are more than a launch of vLLM's kernel takes.
    """
    runner = worker.model_runner
    if SparseConfig.from_vllm(worker.vllm_config).offload is not None:
        compat.zero_no_blocks(runner)
        return
    original = getattr(type(runner), "_zero_block_ids", None)
    if original is None or worker.device.type != "cpu":
        return

    def zero_block_ids(block_ids: list[int]) -> None:
        blocks = torch.tensor(block_ids, device="cpu")
        for cache in caches:
            pages = len(cache) // num_blocks
            cache[(blocks[:, None] * pages + torch.arange(pages, device="cpu")).flatten()] = 0

    num_blocks = runner.kv_cache_config.num_blocks
    layers = layers_of(worker).values()
    caches = [layer.kv_cache for layer in layers if isinstance(layer.kv_cache, torch.Tensor)]
    if any(len(cache) > num_blocks for cache in caches):
        runner._zero_block_ids = zero_block_ids


def check_scales(worker: Any) -> None:
    """Stop an engine whose new weights have other scales of the KV cache than those it was started with.

    Kernels have them in their arguments, which CUDA graphs repeat, and pages were written by them.

    Raises:
        ConfigError: names the layer and both scales.
    """
    if not compat.asks_for_sparse(worker.vllm_config):
        return
    for name, layer in layers_of(worker).items():
        if decision_of(layer).treatment is Treatment.STOCK:
            continue
        old, new = layer.impl.scales, layer.impl.scales_of(layer)
        if new != old:
            raise ConfigError(
                f"--kv-cache-dtype: the weights that were loaded have scales of K, V and queries {tuple(new)} in "
                f"layer {name}, where this engine runs with {tuple(old)}; allowed: weights with the same scales, "
                f"or a new engine"
            )


def report(worker: Any) -> None:
    """One line about what runs how; a warning where nothing is sparse."""
    from vllm.v1.attention.backend import max_decode_query_len

    for layer in layers_of(worker).values():
        layer.sparse_support = decision_of(layer)
        metrics.decided.add(layer)  # those that never asked are counted, too
    decisions = [layer.sparse_support for layer in layers_of(worker).values()]
    config = SparseConfig.from_vllm(worker.vllm_config)
    drafts = max_decode_query_len(worker.vllm_config) - 1
    notes = support.notes(config, drafts, compat.kv_dtype(worker.vllm_config))
    line, any_sparse = support.summary_line(decisions, config, notes)
    if any_sparse or worker.vllm_config.parallel_config.pipeline_parallel_size > 1:  # other stages have others
        logger.info("sparse attention: %s", line)
    else:
        logger.warning("sparse attention does NOTHING in this engine: %s", line)

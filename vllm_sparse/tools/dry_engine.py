"""An engine as vLLM would build it, without weights, workers or a GPU: its config, its layers and its cache.

vLLM's own classes build the model on torch's meta device, where tensors have shapes and no numbers, under the
hooks that a real engine has. So what a layer is and how it runs is decided by the code that decides it at a real
start, and what fits in memory by vLLM's own planner. Not built: layers of drafts, which come from other weights.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.sizing import GIB
from vllm_sparse.support import Decision, Treatment
from vllm_sparse.tools import commands, stand_ins

OVERHEAD_GIB = 2.25
"""Activations, CUDA graphs and workspaces of one GPU where vLLM has not measured them yet."""
UNLISTED = "has layers that cannot be listed without weights"


class EngineRefused(ConfigError):
    """An engine that the sparse backend does not let start; the message is what the start would say."""


@dataclass(frozen=True)
class DryEngine:
    """What vLLM would build of a model on one rank of each pipeline stage."""

    vllm_config: Any
    stages: tuple[dict[str, Any], ...]
    """Layers by name, of each pipeline stage."""
    specs: tuple[dict[str, Any], ...]
    """What vLLM plans for those that have a cache; Mamba, linear and convolution layers are among them."""
    weight_bytes: int
    """Of the rank that holds most."""
    quantised: bool
    """Whether ``weight_bytes`` are those of the checkpoint's quantisation, where it has one."""

    @property
    def attention(self) -> dict[str, Any]:
        """Attention layers of all stages, by name: those that the start line counts."""
        from vllm.model_executor.layers.mamba.abstract import MambaBase

        return {
            name: layer
            for stage in self.stages
            for name, layer in stage.items()
            if not isinstance(layer, MambaBase)
        }

    @property
    def linear_layers(self) -> int:
        """Mamba, linear-attention and convolution layers."""
        return sum(map(len, self.stages)) - len(self.attention)

    @property
    def decisions(self) -> dict[str, Decision]:
        from vllm_sparse.backend.hooks import decision_of

        return {name: decision_of(layer) for name, layer in self.attention.items()}

    @property
    def is_sparse(self) -> bool:
        return any(decision.treatment is Treatment.SPARSE for decision in self.decisions.values())

    def tokens(self, kv_bytes: int) -> int:
        """Tokens of context that vLLM counts in ``kv_bytes`` of each rank, as its log says them.

        Where layers have windows or states it is what requests of ``max_model_len`` hold together.
        """
        return min((self._tokens(specs, kv_bytes) for specs in self.specs if specs), default=0)

    def _tokens(self, specs: dict[str, Any], kv_bytes: int) -> int:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

        planning = compat.kv_cache_planning()
        groups = planning.get_kv_cache_groups(self.vllm_config, dict(specs))
        planned = planning.get_kv_cache_config_from_groups(self.vllm_config, groups, kv_bytes)
        return get_kv_cache_capacity(self.vllm_config, planned)[0]


def stock_of(engine: DryEngine, args: Any) -> DryEngine:
    """The same engine without the sparse backend, of whose layers only the specs are to be used.

    Pages without summaries are all the difference, but beside states, to whose size vLLM fits its blocks anew.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_sparse.backend.spec import SparseAttentionSpec

    if engine.linear_layers:
        return dry_engine(args, sparse=False)
    names = [field.name for field in fields(FullAttentionSpec) if field.init]

    def plain(spec: Any) -> Any:
        if not isinstance(spec, SparseAttentionSpec):
            return spec
        return FullAttentionSpec(**{name: getattr(spec, name) for name in names})

    return replace(engine, specs=tuple({name: plain(spec) for name, spec in of.items()} for of in engine.specs))


def kv_bytes(engine: DryEngine, gpu_gib: float, utilization: float, kv_gib: float | None) -> int:
    """Memory for KV on each GPU of ``gpu_gib``.

    Args:
        kv_gib: it, where it is known; None: what weights and :data:`OVERHEAD_GIB` leave of ``utilization``.

    Raises:
        ConfigError: nothing is left.
    """
    if kv_gib is not None:
        if kv_gib > gpu_gib:
            raise ConfigError(f"--kv-gib: {kv_gib:g} of --gpu {gpu_gib:g}; allowed: up to {gpu_gib:g}")
        return int(kv_gib * GIB)
    usable, weights = gpu_gib * utilization, engine.weight_bytes / GIB
    left = int((usable - weights - OVERHEAD_GIB) * GIB)
    if left <= 0:
        raise ConfigError(
            f"--gpu: of {gpu_gib:g} GiB, {usable:.2f} may be used, and the weights take {weights:.2f} of each "
            f"rank; nothing is left for KV"
        )
    return left


def settle_platform() -> None:
    """Install the sparse backend, and have vLLM plan for a CPU where it finds no device, as builds for GPUs may.

    To be called before anything else imports vLLM, whose modules each keep the platform that they found.

    Raises:
        ConfigError: there is no vLLM here, or an older one than is served.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        from vllm import platforms
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported here ({error}); allowed: an environment that has it") from None
    if not platforms.current_platform.device_type:
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()
    from vllm_sparse.backend.install import install

    try:
        install()
    except RuntimeError as error:
        raise ConfigError(f"vllm: {error}") from error


def on_cpu() -> bool:
    """Whether what is found here stands for a GPU that is not here."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what vLLM logs on its way, warnings too: a report says what matters of it.

    Not by a level of its loggers, which some releases set anew with each config.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def engine_args(model: str, options: Sequence[str], sparse: dict | None = None) -> Any:
    """vLLM's arguments for ``vllm serve MODEL OPTIONS``.

    Args:
        options: words, or a single text that holds them all.
        sparse: settings of the sparse backend beside those in ``options``, None for none.

    Raises:
        ConfigError: an option that this vLLM does not know, or that means another model, backend or settings.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Strict(FlexibleArgumentParser):
        def error(self, message):
            raise ConfigError(f"--vllm-args: {message}; allowed: options of `vllm serve` of this vLLM")

    if len(options) == 1:
        try:
            options = shlex.split(options[0]) if " " in options[0].strip() else options
        except ValueError as error:
            raise ConfigError(f"--vllm-args: {options[0]!r} cannot be split into words: {error}") from None
    parser = make_arg_parser(Strict(add_help=False))
    try:
        parsed = parser.parse_args(list(options))
        named = getattr(parsed, "model_tag", None) or parsed.model != AsyncEngineArgs.model
        parsed.model = model
        found = AsyncEngineArgs.from_cli_args(parsed)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # of checks that vLLM makes of single options
        alone = parser.parse_args([])
        alone.model = model
        try:
            AsyncEngineArgs.from_cli_args(alone)
        except Exception as refused:  # offline vLLM looks for the model here
            raise commands.unusable_model(alone, refused) from refused
        raise ConfigError(f"--vllm-args: vLLM refuses them: {commands.told(error)}") from error
    if named:
        raise ConfigError(f"--vllm-args: they name a model; allowed: options beside MODEL, {model!r}")
    if sparse is not None:
        additional = found.additional_config or {}
        if not isinstance(additional, dict) or "sparse" in additional:
            raise ConfigError("--sparse: --vllm-args have an --additional-config with settings; allowed: one")
        found.additional_config = {**additional, "sparse": sparse}
    return found


def dry_engine(args: Any, sparse: bool = True) -> DryEngine:
    """The engine of vLLM's ``args``.

    Args:
        sparse: ask for the sparse backend, unless the arguments name it for some kinds of layers; False: stock.

    Raises:
        EngineRefused: the sparse backend refuses it.
        ConfigError: vLLM cannot build it.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    vllm_args = copy(args)
    named = getattr(vllm_args.attention_backend, "name", vllm_args.attention_backend)
    if sparse and not compat.asks_for_sparse(vllm_args):
        if named is not None and str(named).upper() not in ("AUTO", compat.NAME):
            raise ConfigError(f"--attention-backend: {str(named).lower()!r}; allowed here: sparse, or none")
        vllm_args.attention_backend = AttentionBackendEnum[compat.NAME]
    if not sparse:
        vllm_args.attention_backend = None
        vllm_args.attention_config = replace(vllm_args.attention_config, backend=None, backend_per_kind={})
    if vllm_args.distributed_executor_backend is None:
        vllm_args.distributed_executor_backend = "mp"  # or vLLM would count the GPUs of this machine
    if vllm_args.block_size is None and on_cpu():
        vllm_args.block_size = 16  # a GPU's default
    with stand_ins.caches_of_a_gpu() if on_cpu() else nullcontext():
        return _built(_configured(vllm_args), vllm_args)


def _configured(args: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext

    try:
        vllm_config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # of vLLM, Transformers, the hub, the model's own code, or ours
        raise _raised(args, error, "cannot be used") from error
    if on_cpu() and args.enable_dbo and compat.asks_for_sparse(vllm_config):
        from vllm_sparse import support

        vllm_config.parallel_config.enable_dbo = True  # which vLLM drops on CPUs before it asks us
        try:
            support.check_options(vllm_config, SparseConfig.from_vllm(vllm_config))
        except ConfigError as error:
            raise EngineRefused(str(error)) from error
    return vllm_config


def _raised(args: Any, error: Exception, problem: str) -> ConfigError:
    """What to raise for ``error``, in which one of ours may be wrapped by pydantic."""
    inner = error
    if hasattr(error, "errors"):
        found = (each.get("ctx", {}).get("error") for each in error.errors())
        inner = next((each for each in found if isinstance(each, ConfigError)), error)
    if isinstance(inner, ConfigError):
        return EngineRefused(str(inner))
    return commands.unusable_model(args, error, problem)


def _built(vllm_config: Any, args: Any) -> DryEngine:
    """Layers of every pipeline stage.

    A quantisation whose layers cannot be made here, such as one for GPUs on a CPU, is left out: it changes no
    attention layer but the dtype of its cache, which is known before.
    """
    try:
        compat.check_kv_cache_scheme(vllm_config.model_config)
    except Exception as error:  # of vLLM, which takes it nowhere
        raise commands.unusable_model(args, error, "cannot be used") from error
    try:
        return _build(vllm_config, quantised=True)
    except ConfigError as error:
        raise EngineRefused(str(error)) from error
    except Exception as error:
        if vllm_config.quant_config is None:
            raise commands.unusable_model(args, error, UNLISTED) from error
    vllm_config.cache_config.cache_dtype = compat.kv_dtype(vllm_config)
    vllm_config.quant_config = None
    vllm_config.compilation_config.static_forward_context.clear()
    try:
        return _build(vllm_config, quantised=False)
    except ConfigError as error:
        raise EngineRefused(str(error)) from error
    except Exception as error:
        raise commands.unusable_model(args, error, UNLISTED) from error


def _build(vllm_config: Any, quantised: bool) -> DryEngine:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    context = vllm_config.compilation_config.static_forward_context
    stages, weights, parallel = [], [], vllm_config.parallel_config
    for stage in range(parallel.pipeline_parallel_size):
        before = set(context)
        with (
            stand_ins.ranks(parallel, stage),
            stand_ins.without_buffers(),
            stand_ins.rotary_embeddings_apart(),
            set_current_vllm_config(vllm_config),
            set_default_torch_dtype(vllm_config.model_config.dtype),
            torch.device("meta"),
        ):
            model = initialize_model(vllm_config)
        weights.append(sum(weight.numel() * weight.element_size() for weight in model.parameters()))
        new = [(name, layer) for name, layer in context.items() if name not in before]
        stages.append({name: layer for name, layer in new if isinstance(layer, AttentionLayerBase)})
    with stand_ins.ranks(parallel, 0), set_current_vllm_config(vllm_config):
        current_platform.update_block_size_for_backend(vllm_config)
        if current_platform.is_cpu() and vllm_config.cache_config.kv_cache_dtype_skip_layers:
            compat.fit_blocks_to_dtypes(vllm_config)
        specs = tuple(_specs(stage, vllm_config) for stage in stages)
        _resolve_layout(stages, specs, vllm_config)
    return DryEngine(vllm_config, tuple(stages), specs, max(weights), quantised)


def _specs(layers: dict[str, Any], vllm_config: Any) -> dict[str, Any]:
    """What vLLM plans for each of ``layers``, as its runners collect it."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    found = {}
    for name, layer in layers.items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = compat.customised(layer.get_attn_backend(), spec)
        if spec:
            found[name] = spec
    return found


def _resolve_layout(stages: list[dict], specs: tuple[dict, ...], vllm_config: Any) -> None:
    """Have vLLM settle on the order of layers and heads in its memory, without which it plans nothing."""
    from vllm.v1.attention.backends import utils

    backends = {layer.get_attn_backend() for stage in stages for layer in stage.values()}
    layouts = [layout.name for layout in utils.get_supported_kv_cache_layouts(backends)]
    utils.resolve_kv_cache_layout(vllm_config, [layouts], [spec for stage in specs for spec in stage.values()])

"""Everything that differs between vLLM 0.31 and 0.33, and the three places where we hook into it.

The hooks are installed in every process that loads vLLM's plugins, and pass straight through
unless the backend named ``sparse`` was asked for:

1. ``AttentionBackendEnum.SPARSE``, so that ``--attention-backend sparse`` parses and travels to
   other processes.
2. The platform's backend choice: layers that cannot be sparse get the backend vLLM would have
   chosen without us, and CPUs, which know one backend only, get ours.
3. The platform's config check, where a wrong sparse config is refused before anything starts.

Who did not ask for it is never stopped: the hooks are installed all or none, and what fails in them without the
name being asked for is said and passed over.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
import multiprocessing
import os
from contextlib import ExitStack
from typing import Any

NAME = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.backend.SparseBackend"
TESTED = ((0, 31), (0, 33))

logger = logging.getLogger("vllm.vllm_sparse")
"""A child of vLLM's logger, so our lines take its format and level."""


def install() -> None:
    """Install the hooks, all of them or none; re-entrant."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _check_version()
    platform = current_platform if isinstance(current_platform, type) else type(current_platform)
    with ExitStack() as undo:
        if NAME not in AttentionBackendEnum.__members__:
            undo.callback(_remove_backend_name)
        add_backend_name()
        _wrap_classmethod(platform, "get_attn_backend_cls", _choose_backend, undo)
        _wrap_classmethod(platform, "check_and_update_config", _check_config, undo)
        undo.pop_all()


@functools.cache
def log_once(level: int, text: str) -> None:
    """Log ``text`` once, and not in each of an engine's processes as well."""
    if multiprocessing.parent_process() is None:
        logger.log(level, text)


def _check_version() -> None:
    import vllm

    release = getattr(vllm, "__version_tuple__", (0, 0))[:2]
    if release < (0, 2) or TESTED[0] <= release <= TESTED[1]:  # builds from source may know no release
        return
    served = f"{TESTED[0][0]}.{TESTED[0][1]} to {TESTED[1][0]}.{TESTED[1][1]}"
    if release < TESTED[0]:
        raise RuntimeError(f"this is vLLM {vllm.__version__}, and vllm-sparse serves {served}")
    log_once(logging.WARNING, f"vllm-sparse is tested with vLLM {served}; this is {vllm.__version__}")


def add_backend_name() -> Any:
    """Make ``AttentionBackendEnum.SPARSE`` exist in this process and return it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum._member_map_.get(NAME)
    if member is None:
        if hasattr(AttentionBackendEnum, "register"):
            member = AttentionBackendEnum.register(NAME, BACKEND_PATH)
        else:
            member = object.__new__(AttentionBackendEnum)
            member._name_, member._value_ = NAME, BACKEND_PATH
            AttentionBackendEnum._member_map_[NAME] = member
            AttentionBackendEnum._value2member_map_[BACKEND_PATH] = member
            AttentionBackendEnum._member_names_.append(NAME)
        # Engine and worker processes unpickle vLLM's config before they load plugins, and a member
        # pickles as a look-up of its value: ours must add itself first.
        copyreg.pickle(AttentionBackendEnum, _reduce_backend_name)
    elif member.value != BACKEND_PATH:
        raise RuntimeError(f"another backend has the name {NAME}: {member.value}")
    return member


def _remove_backend_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum._member_map_.pop(NAME, None)
    if member is None:
        return
    AttentionBackendEnum._value2member_map_.pop(member._value_, None)
    if NAME in AttentionBackendEnum._member_names_:
        AttentionBackendEnum._member_names_.remove(NAME)
    if NAME in vars(AttentionBackendEnum):
        delattr(AttentionBackendEnum, NAME)
    copyreg.dispatch_table.pop(AttentionBackendEnum, None)


def _reduce_backend_name(member: Any) -> tuple:
    return (add_backend_name, ()) if member.name == NAME else (type(member), (member.value,))


def _wrap_classmethod(cls: type, name: str, wrapper, undo: ExitStack) -> None:
    """Put ``wrapper`` around a class method; ``undo`` gets what takes it away."""
    original = inspect.getattr_static(cls, name)
    if not isinstance(original, classmethod):
        raise TypeError(f"{cls.__name__}.{name} is no class method")
    function = original.__func__
    if getattr(function, "_vllm_sparse", False):
        return

    @functools.wraps(function)
    def wrapped(cls, *args, **kwargs):
        return wrapper(functools.partial(function, cls), *args, **kwargs)

    wrapped._vllm_sparse = True
    if name in vars(cls):
        undo.callback(setattr, cls, name, original)
    else:
        undo.callback(delattr, cls, name)
    setattr(cls, name, classmethod(wrapped))


def _choose_backend(original, *args, **kwargs) -> str:
    if any(getattr(value, "name", None) == NAME for value in (*args, *kwargs.values())):
        return _choose_asked(original, *args, **kwargs)
    return original(*args, **kwargs)


def _import_backend() -> type:
    """:class:`vllm_sparse.backend.backend.SparseBackend`, with hooks on vLLM's workers that nobody else needs."""
    try:
        from vllm_sparse.backend.backend import SparseBackend
    except Exception as error:
        raise RuntimeError(
            f"--attention-backend sparse is not available: {type(error).__name__}: {error}"
        ) from error
    return SparseBackend


def _choose_asked(original, selected_backend, attn_selector_config, num_heads=None) -> str:
    from vllm.platforms import current_platform

    from vllm_sparse import metrics

    SparseBackend = _import_backend()
    wanted = dict(attn_selector_config._asdict())
    reasons = SparseBackend.validate_configuration(
        device_capability=current_platform.get_device_capability(), **wanted
    )
    if not reasons:
        return BACKEND_PATH
    metrics.count_stock_layer(", ".join(reasons))
    return original(None, attn_selector_config=attn_selector_config, num_heads=num_heads)


def asks_for_sparse(vllm_config) -> bool:
    """Whether an engine's config names this backend for any of its layers."""
    attention = getattr(vllm_config, "attention_config", None)
    chosen = [getattr(attention, "backend", None), *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", None) == NAME for backend in chosen)


def _check_config(original, *args, **kwargs) -> Any:
    found = original(*args, **kwargs)
    vllm_config = next(iter((*args, *kwargs.values())), None)
    try:
        asked = asks_for_sparse(vllm_config)
        if not asked:
            _say_what_is_not_read(vllm_config)
    except Exception as error:
        log_once(
            logging.WARNING,
            f"vllm-sparse: cannot tell whether this vLLM was asked for it: {type(error).__name__}: {error}",
        )
        return found
    if asked:
        _check_asked(vllm_config)
    return found


def _say_what_is_not_read(vllm_config) -> None:
    """Name settings of ours in an engine that was not asked to be sparse, which is not stopped for them."""
    from vllm_sparse import misplaced
    from vllm_sparse.config import ENV_CONFIG

    unasked = "--attention-backend sparse was not asked for"
    if found := misplaced.unread(getattr(vllm_config, "additional_config", None)):
        log_once(logging.WARNING, f"vllm-sparse: {unasked}, so attention is vLLM's own. {' '.join(found)}")
    if os.environ.get(ENV_CONFIG, "").strip():  # may be meant for other engines of this shell
        log_once(logging.INFO, f"vllm-sparse: {ENV_CONFIG} is not read: {unasked}")


def _check_asked(vllm_config) -> None:
    from vllm.platforms import current_platform

    from vllm_sparse.config import TABLES, ConfigError, SparseConfig
    from vllm_sparse.policies.registry import DECODE_POLICIES
    from vllm_sparse.summaries import FROZEN

    if not current_platform.is_cpu():
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend sparse: its kernels need Triton, which cannot be imported here ({error})"
            ) from None
    config = SparseConfig.from_vllm(vllm_config)
    found = with_tables(vllm_config, config)
    read = (key for key in TABLES if getattr(found, key) is not getattr(config, key))
    _carry(vllm_config, config, found, next(read, ""))
    cache = vllm_config.cache_config
    if cache is None:
        return
    if current_platform.is_cpu() and not getattr(cache, "user_specified_block_size", False):
        # CPUs default to 128, at which a budget of a few hundred tokens holds no pages to choose; 32
        # is the least that vLLM's own CPU backend takes for layers that are left to it.
        cache.block_size = 32
    if cache.block_size is not None:
        config.check_page_size(cache.block_size)
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ConfigError(
            f"--kv-cache-dtype: {cache.cache_dtype!r} is not supported by the sparse backend; "
            f"allowed: auto, float16, bfloat16"
        )
    parallel = vllm_config.parallel_config
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise ConfigError(
            f"--decode-context-parallel-size: {parallel.decode_context_parallel_size} is not supported by the "
            f"sparse backend; allowed: 1"
        )
    if getattr(parallel, "enable_dbo", False):
        raise ConfigError(
            "--enable-dbo: micro-batches would share the buffers of one decode step; the sparse backend "
            "runs without it"
        )
    config = SparseConfig.from_vllm(vllm_config)
    if vllm_config.speculative_config is not None and DECODE_POLICIES[config.decode_policy].summary == FROZEN:
        raise ConfigError(
            f"sparse.decode_policy: {config.decode_policy!r} with --speculative-config: drafts to verify look "
            f"like the end of a prompt, and pages would be chosen anew in every step; allowed with drafts: a "
            f"policy that scores pages in each step"
        )
    if config.offload is not None:
        from vllm_sparse.backend import offload

        found = offload.check(vllm_config, config)
        _carry(vllm_config, config, found, "offload")
        vllm_config.additional_config[offload.ADMITTED] = found.offload.host_gib


def with_tables(vllm_config, config):
    """``config`` with the patterns and budgets that it names for the heads of the engine's model."""
    model = vllm_config.model_config
    if model is None:
        return config
    layers, heads = (getattr(model.hf_text_config, f"num_{of}", 0) for of in ("hidden_layers", "attention_heads"))
    config = config.with_patterns(model.model, layers, heads)
    if config.head_budgets == "none":
        return config
    return config.with_budgets(model.model, layers, model.get_total_num_kv_heads())


def _carry(vllm_config, config, found, key: str) -> None:
    """Put the settings into vLLM's config, which it takes to every worker: other nodes have other files.

    So a path in ``VLLM_SPARSE_CONFIG`` or in :data:`vllm_sparse.config.TABLES` is read on the driver alone.
    """
    additional = vllm_config.additional_config or {}
    if isinstance(additional, dict):
        vllm_config.additional_config = {**additional, "sparse": found.to_mapping()}
    elif found is not config:
        from vllm_sparse.config import ConfigError

        raise ConfigError(
            f"sparse.{key}: {getattr(config, key)!r} cannot travel beside an additional_config that is "
            f"no object; allowed: none"
        )


def install_worker_method() -> None:
    """``collective_rpc("sparse_metrics")``: the counts of every worker, by a name that needs no pickle."""
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_sparse import metrics

    WorkerBase.sparse_metrics = metrics.snapshot


def install_spec_hook() -> None:
    """Let backends adjust their KV-cache spec on releases whose ``Attention`` does not ask them."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionBackend

    if hasattr(AttentionBackend, "customize_spec") or hasattr(Attention.get_kv_cache_spec, "_vllm_sparse"):
        return
    original = Attention.get_kv_cache_spec

    @functools.wraps(original)
    def get_kv_cache_spec(self, vllm_config):
        spec = original(self, vllm_config)
        customize = getattr(self.attn_backend, "customize_spec", None)
        return spec if spec is None or customize is None else customize(spec)

    get_kv_cache_spec._vllm_sparse = True
    Attention.get_kv_cache_spec = get_kv_cache_spec


def install_memory_hooks() -> None:
    """Let offload say how many blocks there are, and build its store once vLLM has settled on a number.

    On the wrapper that executors of all kinds call workers through, so that it serves CPUs and GPUs.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "_vllm_sparse"):
        return
    initialize = WorkerWrapperBase.initialize_from_config

    def determine_available_memory(self) -> int:
        from vllm_sparse.backend import offload

        return offload.available_memory(self.worker, self.worker.determine_available_memory())

    @functools.wraps(initialize)
    def initialize_from_config(self, kv_cache_configs):
        from vllm_sparse.backend import offload

        result = initialize(self, kv_cache_configs)
        offload.build_store(self.worker, kv_cache_configs[self.global_rank])
        return result

    WorkerWrapperBase._vllm_sparse = True
    WorkerWrapperBase.determine_available_memory = determine_available_memory
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def head_major_layouts() -> tuple | None:
    """``supported_kv_cache_layouts``: block, head, row; layers inside or outside of blocks."""
    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        return None
    return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


def pages_count_rows() -> bool:
    """Whether vLLM sizes a page by its rows (0.31 on) rather than by its bytes."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return hasattr(FullAttentionSpec, "get_num_kernel_states")


def replace_rows(common, **rows):
    """A copy of vLLM's common metadata for other rows, without what it derived from the old ones."""
    derived = (
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        "seq_lens_cpu_upper_bound",
        "is_prefilling",
    )
    return common.replace(**{name: None for name in derived if hasattr(common, name)}, **rows)

"""Everything that may differ between releases of vLLM, and what is hooked in every process that loads its plugins.

These hooks pass straight through unless the backend named ``sparse`` was asked for:

1. ``AttentionBackendEnum.SPARSE``, so that ``--attention-backend sparse`` parses and travels to
   other processes; where it arrives, the hooks of :mod:`vllm_sparse.backend.hooks` are installed.
2. The platform's backend choice, which answers with vLLM's own.
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
"""The newest release and the two before it."""
TARGET_TAGS = ("backbone", "self_decoder", "cross_decoder")
"""How vLLM tags the parts of a model while it builds them; a tag that is not known is taken for a draft's."""

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
        else:  # 0.31
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


def _arrive() -> Any:
    """The member in a process that was sent it: an engine that asks for it is about to be built here."""
    member = add_backend_name()
    _install_hooks()
    return member


def _install_hooks() -> None:
    """Hook layers and workers, which nobody needs who did not ask.

    Raises:
        RuntimeError: this vLLM cannot be hooked; says why.
    """
    try:
        from vllm_sparse.backend import hooks

        hooks.install()
    except Exception as error:
        raise RuntimeError(
            f"--attention-backend sparse is not available: {type(error).__name__}: {error}"
        ) from error


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
    return (_arrive, ()) if member.name == NAME else (type(member), (member.value,))


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
    """What vLLM's selector gets for ``sparse``: its own choice.

    The layers that can be sparse never ask it (:mod:`vllm_sparse.backend.hooks`); who does is a layer that wraps
    another backend, such as chunked-local attention, or one with latent attention.
    """
    if not any(getattr(value, "name", None) == NAME for value in (*args, *kwargs.values())):
        return original(*args, **kwargs)
    from vllm_sparse.backend import hooks

    if not hooks.installed():
        raise RuntimeError("--attention-backend: sparse was asked for, and this process has no hooks for it")
    args = [None if getattr(value, "name", None) == NAME else value for value in args]
    kwargs = {key: None if getattr(value, "name", None) == NAME else value for key, value in kwargs.items()}
    return original(*args, **kwargs)


def asks_for_sparse(vllm_config) -> bool:
    """Whether an engine's config names this backend for any of its layers, those of drafts included."""
    attention = getattr(vllm_config, "attention_config", None)
    chosen = [getattr(attention, "backend", None), *(getattr(attention, "backend_per_kind", None) or {}).values()]
    chosen.append(getattr(getattr(vllm_config, "speculative_config", None), "attention_backend", None))
    return any(getattr(backend, "name", None) == NAME for backend in chosen)


def builds_a_draft() -> bool:
    """Whether the layers that vLLM builds now are those of a draft model or head."""
    from vllm.compilation import backends

    return backends.model_tag not in TARGET_TAGS


def kv_dtype(vllm_config) -> str:
    """Of the KV cache."""
    asked = vllm_config.cache_config.cache_dtype
    return str(vllm_config.model_config.dtype).removeprefix("torch.") if asked == "auto" else asked


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

    from vllm_sparse import support
    from vllm_sparse.config import TABLES, SparseConfig
    from vllm_sparse.errors import ConfigError

    _install_hooks()
    if not current_platform.is_cpu():
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend sparse: its kernels need Triton, which cannot be imported here ({error})"
            ) from None
    config, model = SparseConfig.from_vllm(vllm_config), vllm_config.model_config
    left = model and support.stock_model(config, model.is_hybrid, model.is_encoder_decoder)
    if left:
        if config.offload is not None:
            raise ConfigError(
                f"sparse.offload: every layer would run as in stock vLLM: {left.reason}; allowed: null"
            )
        return  # what follows would change an engine that stays as it is
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
    if model is not None:
        _check_kv_dtype(cache.cache_dtype, model)
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
    if config.offload is not None:
        from vllm_sparse.backend import offload

        found = offload.check(vllm_config, config)
        _carry(vllm_config, config, found, "offload")
        vllm_config.additional_config[offload.ADMITTED] = found.offload.host_gib
    from vllm_sparse.backend import connectors

    connectors.check(vllm_config, config)


def _check_kv_dtype(asked: str, model: Any) -> None:
    """Raise :class:`~vllm_sparse.config.ConfigError` unless the cache has the dtype of the model."""
    from vllm_sparse.errors import ConfigError

    own = str(model.dtype).removeprefix("torch.")
    if asked in ("auto", own):
        return
    quantised = getattr(model.hf_config, "quantization_config", None) or {}
    scheme = quantised.get("kv_cache_scheme") if isinstance(quantised, dict) else None
    if scheme:
        raise ConfigError(
            f"--kv-cache-dtype: the checkpoint's kv_cache_scheme asks for {asked}, and sparse attention has no "
            f"quantised KV cache yet; allowed for this model: {own}, given by name, which comes before the scheme"
        )
    raise ConfigError(
        f"--kv-cache-dtype: {asked!r} is not supported by the sparse backend beside a model of {own}; "
        f"allowed: auto, {own}"
    )


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
        from vllm_sparse.errors import ConfigError

        raise ConfigError(
            f"sparse.{key}: {getattr(config, key)!r} cannot travel beside an additional_config that is "
            f"no object; allowed: none"
        )


def head_major_layouts() -> tuple:
    """``supported_kv_cache_layouts``: block, head, row; layers inside or outside of blocks."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


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

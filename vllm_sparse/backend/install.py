"""What is hooked in every process that loads vLLM's plugins.

These hooks pass straight through unless the backend named ``sparse`` was asked for:

1. ``AttentionBackendEnum.SPARSE``, so that ``--attention-backend sparse`` parses and travels to other processes;
   where it arrives, the hooks of :mod:`vllm_sparse.backend.hooks` are installed.
2. The platform's backend choice, which answers with vLLM's own.
3. The platform's config check, where a wrong sparse config is refused before anything starts
   (:mod:`vllm_sparse.backend.check`).

Who did not ask for it is never stopped: the hooks are installed all or none, and what fails in them without the
name being asked for is said and passed over.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
import os
from contextlib import ExitStack
from typing import Any

from vllm_sparse import ENV_CONFIG
from vllm_sparse.backend.compat import (
    BACKEND_PATH,
    NAME,
    asks_for_sparse,
    check_version,
    log_once,
    register_backend,
)


def install() -> None:
    """Install the hooks, all of them or none; re-entrant."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    check_version()
    platform = current_platform if isinstance(current_platform, type) else type(current_platform)
    with ExitStack() as undo:
        if NAME not in AttentionBackendEnum.__members__:
            undo.callback(_remove_backend_name)
        add_backend_name()
        _wrap_classmethod(platform, "get_attn_backend_cls", _choose_backend, undo)
        _wrap_classmethod(platform, "check_and_update_config", _check_config, undo)
        undo.pop_all()


def add_backend_name() -> Any:
    """Make ``AttentionBackendEnum.SPARSE`` exist in this process and return it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum._member_map_.get(NAME)
    if member is None:
        member = register_backend()
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
        from vllm_sparse.backend.check import check_engine

        _install_hooks()
        check_engine(vllm_config)
    return found


def _say_what_is_not_read(vllm_config) -> None:
    """Name settings of ours in an engine that was not asked to be sparse, which is not stopped for them."""
    additional = getattr(vllm_config, "additional_config", None)
    unasked = "--attention-backend sparse was not asked for"
    if additional:  # who set nothing loads nothing of ours
        from vllm_sparse import misplaced
        from vllm_sparse.config import KEYS

        if found := misplaced.unread(additional, KEYS):
            log_once(logging.WARNING, f"vllm-sparse: {unasked}, so attention is vLLM's own. {' '.join(found)}")
    if os.environ.get(ENV_CONFIG, "").strip():  # may be meant for other engines of this shell
        log_once(logging.INFO, f"vllm-sparse: {ENV_CONFIG} is not read: {unasked}")

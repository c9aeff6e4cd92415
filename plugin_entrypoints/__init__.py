"""vLLM's ``general_plugins`` entry point."""

from __future__ import annotations

import enum
import logging
import multiprocessing

NAME = "SPARSE"
logger = logging.getLogger("vllm.vllm_sparse")
_reasons: dict[str, str] = {}
"""Names that could not be added to vLLM, and what asking for each says."""


def register() -> None:
    """Make ``--attention-backend sparse`` known; called by vLLM in every process, any number of times.

    Until that name is asked for, nothing in vLLM behaves differently, whatever fails here: that is one warning,
    and what asking for the name then says.
    """
    try:
        from vllm_sparse.backend import install

        install.install()
    except Exception as error:
        _give_reason(f"{type(error).__name__}: {error}")
    else:
        _reasons.clear()


def _give_reason(reason: str) -> None:
    said = NAME in _reasons
    _reasons[NAME] = f"--attention-backend sparse is not available: vllm-sparse cannot be loaded ({reason})"
    if said:
        return
    # The other processes of an engine find the same.
    if multiprocessing.parent_process() is None:
        logger.warning("%s; vLLM runs as without it", _reasons[NAME])
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except Exception:  # what the warning is about: this vLLM refuses the name in words of its own
        return
    _answer_with_reason(type(AttentionBackendEnum))


def _answer_with_reason(look_up_of_names: type) -> None:
    """Have vLLM's look-up of backends say why ours is missing, where it has one of its own."""
    original = vars(look_up_of_names).get("__getitem__")
    if look_up_of_names is enum.EnumMeta or original is None or hasattr(original, "_vllm_sparse"):
        return

    def __getitem__(cls, name):
        if name in _reasons and name not in cls.__members__:
            raise ValueError(_reasons[name])
        return original(cls, name)

    __getitem__._vllm_sparse = True
    look_up_of_names.__getitem__ = __getitem__

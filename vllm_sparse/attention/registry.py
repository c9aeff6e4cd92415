"""Names of attention kernels, as used in ``SparseConfig.attention_kernel``, and how ``auto`` chooses one."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from vllm_sparse.attention.base import AttentionKernel, AttentionShape
from vllm_sparse.errors import ConfigError

ATTENTION_KERNELS: dict[str, str] = {
    "triton": "vllm_sparse.attention.triton_attn.TritonAttention",
    "fa3": "vllm_sparse.attention.fa3_attn.FA3Attention",
    "xformers": "vllm_sparse.attention.xformers_attn.XFormersAttention",
    "torch": "vllm_sparse.attention.torch_attn.TorchAttention",
}
"""Class paths, fastest in decode first; classes are imported when chosen, so none is a hard dependency."""

DECODE_ORDER = tuple(ATTENTION_KERNELS)
"""What ``auto`` tries for decode."""

PREFILL_ORDER = ("fa3", "triton", "torch")
"""What ``auto`` tries for prefill: only FlashAttention-3 uses all of a Hopper's tensor cores."""

OFFLOAD_ORDER = ("triton", "torch")
"""What ``auto`` tries for decode with offload: kernels that also attend to head pages on the host."""


def kernel_class(name: str) -> type[AttentionKernel]:
    """The class of the attention kernel ``name``, imported now."""
    module, _, attribute = ATTENTION_KERNELS[name].rpartition(".")
    return getattr(import_module(module), attribute)


def choose_kernel(name: str, shape: AttentionShape, order: Iterable[str] = DECODE_ORDER) -> AttentionKernel:
    """The attention kernel ``name`` for ``shape``; ``auto`` takes the first of ``order`` that supports it.

    Raises:
        ConfigError: the kernel cannot serve this layer on this device; says why and what can.
    """
    candidates = order if name == "auto" else (name,)
    for candidate in candidates:
        kernel = kernel_class(candidate)
        reason = kernel.unsupported(shape)
        if reason is None:
            return kernel()
    usable = [other for other in ATTENTION_KERNELS if kernel_class(other).unsupported(shape) is None]
    raise ConfigError(
        f"sparse.attention_kernel: {name!r} cannot run here: {reason}. Allowed here: auto, {', '.join(usable)}"
    )

"""Attention over a PageTable: :mod:`vllm_sparse.attention.base` says what an attention kernel is."""

from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.attention.registry import (
    ATTENTION_KERNELS,
    DECODE_ORDER,
    OFFLOAD_ORDER,
    PREFILL_ORDER,
    choose_kernel,
)

__all__ = [
    "ATTENTION_KERNELS",
    "DECODE_ORDER",
    "OFFLOAD_ORDER",
    "PREFILL_ORDER",
    "AttentionKernel",
    "choose_kernel",
]

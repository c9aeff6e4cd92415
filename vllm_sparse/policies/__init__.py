"""Policies choose pages; see :mod:`base` and :mod:`prefill_base` here for the one method they need."""

from vllm_sparse.policies.base import DecodePolicy
from vllm_sparse.policies.prefill_base import PrefillPolicy
from vllm_sparse.policies.registry import (
    DECODE_POLICIES,
    PREFILL_POLICIES,
    get_decode_policy,
    get_prefill_policy,
)

__all__ = [
    "DECODE_POLICIES",
    "PREFILL_POLICIES",
    "DecodePolicy",
    "PrefillPolicy",
    "get_decode_policy",
    "get_prefill_policy",
]

"""Policies choose pages: :mod:`~vllm_sparse.policies.base` has their interfaces, ``registry`` their names."""

from vllm_sparse.policies.base import DecodePolicy, PrefillPolicy, PrefillSizes
from vllm_sparse.policies.registry import DECODE_POLICIES, POSITIONS, PREFILL_POLICIES, PRESETS

__all__ = [
    "DECODE_POLICIES",
    "POSITIONS",
    "PREFILL_POLICIES",
    "PRESETS",
    "DecodePolicy",
    "PrefillPolicy",
    "PrefillSizes",
]

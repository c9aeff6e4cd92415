"""Policies choose pages; see :mod:`vllm_sparse.policies.base` for the one method they need."""

from vllm_sparse.policies.base import DecodePolicy
from vllm_sparse.policies.registry import DECODE_POLICIES, get_decode_policy

__all__ = ["DECODE_POLICIES", "DecodePolicy", "get_decode_policy"]

"""Engines attend over a PageTable; see :mod:`vllm_sparse.attention.base` for the methods they have."""

from vllm_sparse.attention.base import Engine
from vllm_sparse.attention.registry import ENGINES, OFFLOAD_ORDER, PREFILL_ORDER, choose_engine

__all__ = ["ENGINES", "OFFLOAD_ORDER", "PREFILL_ORDER", "Engine", "choose_engine"]

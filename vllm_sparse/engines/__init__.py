"""Engines attend over a PageTable; see :mod:`vllm_sparse.engines.base` for the methods they have."""

from vllm_sparse.engines.base import Engine
from vllm_sparse.engines.registry import ENGINES, OFFLOAD_ORDER, PREFILL_ORDER, choose_engine

__all__ = ["ENGINES", "OFFLOAD_ORDER", "PREFILL_ORDER", "Engine", "choose_engine"]

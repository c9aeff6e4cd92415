"""Engines attend over a PageTable; see :mod:`vllm_sparse.engines.base` for the methods they have."""

from vllm_sparse.engines.base import Engine
from vllm_sparse.engines.registry import ENGINES, PREFILL_ORDER, choose_engine

__all__ = ["ENGINES", "PREFILL_ORDER", "Engine", "choose_engine"]

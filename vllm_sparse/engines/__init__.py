"""Engines attend over a PageTable; see :mod:`vllm_sparse.engines.base` for the one method they need."""

from vllm_sparse.engines.base import Engine
from vllm_sparse.engines.registry import ENGINES, choose_engine

__all__ = ["ENGINES", "Engine", "choose_engine"]

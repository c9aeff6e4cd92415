"""Reference of :mod:`vllm_sparse.kernels.code_queries`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import in_cache


def code_queries(q: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    out.copy_(in_cache(q, out.dtype, scale))

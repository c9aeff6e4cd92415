"""Reference of :mod:`vllm_sparse.kernels.read_pages`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import kept


def read_pages(
    source: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    places: torch.Tensor,
    programs: int,
    exponents: torch.Tensor | None = None,
) -> None:
    wanted = places >= 0
    out[places[wanted].long()] = kept(source, exponents, blocks[wanted].long(), out.dtype)[:, :, : out.shape[2]]

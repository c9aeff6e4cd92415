"""K and V in 8 bits, as :mod:`vllm_sparse.kernels.e4m3` keeps them."""

from __future__ import annotations

import torch


def in_cache(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """``x`` as a cache of ``dtype`` holds it: of e4m3, saturated codes of ``x / scale``."""
    if dtype is not torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.float() / scale).clamp(-448, 448).to(dtype)


def kept(host: torch.Tensor, exponents: torch.Tensor | None, index, dtype: torch.dtype) -> torch.Tensor:
    """``host[index]`` as the GPU sees it; ``index`` chooses blocks, and perhaps heads."""
    return host[index] if exponents is None else from_e4m3(host[index], exponents[index], dtype)


def to_e4m3(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kv`` [..., rows, 2 * head_dim] as codes and exponents [..., 2]; see :mod:`vllm_sparse.kernels.e4m3`."""
    most_coded = 61440 if kv.dtype is torch.float16 else 448 * 2.0**119
    parts = kv.float().unflatten(-1, (2, -1))
    finite, parts = parts.isfinite(), parts.clamp(-most_coded, most_coded)
    most = torch.where(finite, parts.abs(), 0).amax((-3, -1))
    mantissa, exponent = torch.frexp(most)
    exponents = torch.where(most > 0, exponent - 9 + (mantissa > 0.875) + 127, 1).clamp(min=1).to(torch.uint8)
    scaled = parts / _power_of(exponents)
    return torch.where(finite, scaled, float("nan")).flatten(-2).to(torch.float8_e4m3fn), exponents


def from_e4m3(codes: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float().unflatten(-1, (2, -1)) * _power_of(exponents)).flatten(-2).to(dtype)


def _power_of(exponents: torch.Tensor) -> torch.Tensor:
    return (exponents.int() << 23).view(torch.float32)[..., None, :, None]

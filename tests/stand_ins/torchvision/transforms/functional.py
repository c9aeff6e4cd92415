"""Images as tensors [..., channels, height, width]."""

from __future__ import annotations

import numpy as np
import torch

from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode", "normalize", "pil_to_tensor", "resize"]


def pil_to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: torch.Tensor, size, interpolation=InterpolationMode.BILINEAR, antialias=True) -> torch.Tensor:
    images = image.reshape(-1, *image.shape[-3:]).float()
    found = torch.nn.functional.interpolate(images, tuple(size), mode=interpolation.value, antialias=antialias)
    return found.reshape(*image.shape[:-2], *found.shape[-2:]).to(image.dtype)


def normalize(image: torch.Tensor, mean, std) -> torch.Tensor:
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return (image - mean) / std

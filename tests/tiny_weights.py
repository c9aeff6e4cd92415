"""A ``load_format`` of vLLM's for models that have no weights on disk: an engine draws them, always the same."""

from __future__ import annotations

import zlib

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

DRAWN = "drawn"
SCALE = 0.2


@register_model_loader(DRAWN)
class DrawnWeights(DummyModelLoader):
    """Matrices of random numbers, norms of ones and biases of zeros.

    vLLM's own random weights are so small that a model repeats itself.
    """

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and weight.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.data.copy_(SCALE * torch.randn(weight.shape, generator=generator))
            elif weight.is_floating_point():
                weight.data.fill_("norm" in name)

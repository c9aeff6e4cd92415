"""What host code allocates and waits for, seen without a GPU: every operation of torch, while no kernel runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
"""Operations that bring values of a GPU to the host."""


class Allocations(TorchDispatchMode):
    """Records operations that make a tensor of their own, and those that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, int]] = []
        """Name and bytes."""
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            self.waits.append(name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() and _storage(leaf) not in given:
                self.made.append((name, leaf.untyped_storage().nbytes()))
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

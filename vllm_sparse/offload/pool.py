"""HostPool: K and V of all blocks of a rank in CPU memory that the GPU reads and writes."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch

from vllm_sparse.config import ConfigError
from vllm_sparse.offload.limits import read_limits
from vllm_sparse.offload.sizing import GIB, CacheShape

logger = logging.getLogger("vllm.vllm_sparse")

PIECE_BYTES = GIB
"""Memory is pinned in pieces, so that a failure is met early and says how far it came."""


class HostPool:
    """One tensor per layer, [num_blocks, kv_heads, page_size, 2 * head_dim], addressable by ``device``.

    On a GPU the memory is pinned and mapped (unified virtual addressing); on a CPU it is ordinary.
    """

    def __init__(self, shape: CacheShape, num_blocks: int, dtype: torch.dtype, device: torch.device):
        """Allocate and pin.

        Raises:
            ConfigError: the host gave or pinned less than all of it; everything is given back first.
        """
        self.pages = (num_blocks, shape.kv_heads, shape.page_size, 2 * shape.head_dim)
        size = num_blocks * shape.kv_heads * shape.unit_bytes
        self._pinned: list[int] = []
        self._memory: list[mmap.mmap] = []
        # Where an engine ends in a process that goes on. At exit the driver lets go of everything itself.
        weakref.finalize(self, _give_back, self._pinned, self._memory).atexit = False
        self.layers: list[torch.Tensor] = []
        total = size * shape.layers
        try:
            for _ in range(shape.layers):
                memory = mmap.mmap(-1, size)
                self._memory.append(memory)
                with suppress(OSError):  # advice, which some kernels do not take: pinning is only slower
                    memory.madvise(mmap.MADV_HUGEPAGE)
                host = torch.frombuffer(memory, dtype=dtype).view(self.pages)
                if device.type != "cpu":
                    self._pin(host.data_ptr(), size, pin)
                    host = view_from_device(host)
                self.layers.append(host)
        except (OSError, RuntimeError) as error:
            pinned = len(self.layers) * size
            self.close()
            raise ConfigError(
                f"sparse.offload.host_gib: the host pool of this rank, {total / GIB:.2f} GiB, could not be "
                f"allocated and pinned: {error}, after {pinned / GIB:.2f} GiB; {read_limits()}. "
                f"Lower sparse.offload.host_gib"
            ) from error

    def _pin(self, address: int, size: int, pin_piece: Callable[[int, int], None]) -> None:
        for start in range(0, size, PIECE_BYTES):
            pin_piece(address + start, min(PIECE_BYTES, size - start))
            self._pinned.append(address + start)

    @property
    def num_bytes(self) -> int:
        return sum(len(memory) for memory in self._memory)

    def close(self) -> None:
        """Unpin and forget; tensors that were taken from here must not be used any more."""
        self.layers.clear()
        _give_back(self._pinned, self._memory)


def _give_back(pinned: list[int], memory: list[mmap.mmap]) -> None:
    for address in pinned:
        try:
            unpin(address)
        except RuntimeError as error:  # the others are still to be given back
            logger.warning("sparse attention: %s", error)
    pinned.clear()
    memory.clear()


def pin(address: int, size: int) -> None:
    """Pin and map host memory for the current GPU; raises ``RuntimeError`` where the driver refuses."""
    portable_and_mapped = 3
    error = torch.cuda.cudart().cudaHostRegister(address, size, portable_and_mapped)
    if int(error) != 0:
        raise RuntimeError(f"cudaHostRegister of {size / GIB:.2f} GiB: {error}")


def unpin(address: int) -> None:
    error = torch.cuda.cudart().cudaHostUnregister(address)
    if int(error) != 0:
        raise RuntimeError(f"cudaHostUnregister: {error}")


def view_from_device(host: torch.Tensor) -> torch.Tensor:
    """``host``, pinned, as a tensor of the GPU."""
    import vllm._custom_ops  # noqa: F401  registers what gives the view
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(host)

"""HostPool: K and V of all pages of a rank in CPU memory that the GPU reads and writes."""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from tqdm import tqdm

from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.limits import read_limits
from vllm_sparse.offload.sizing import GIB, CacheShape

logger = logging.getLogger("vllm.vllm_sparse")

PIECE_BYTES = GIB
"""Memory is pinned in pieces, so that a failure is met early and says how far it came."""
MOST_THREADS = 16
"""Threads that touch memory ahead of pinning: the system zeroes a page in the thread that first touches it."""
QUIET_BYTES = 8 * GIB
"""Size below which memory is pinned in a few seconds, without a progress bar."""


class HostPool:
    """One tensor per layer, [num_pages, kv_heads, page_size, 2 * head_dim], addressable by ``device``.

    On a GPU the memory is pinned and mapped (unified virtual addressing); on a CPU it is ordinary.
    """

    def __init__(self, shape: CacheShape, num_pages: int, dtype: torch.dtype, device: torch.device):
        """Allocate and pin; ``dtype`` is that of the cache, which may be stored smaller (``shape.host_dtype``).

        Raises:
            ConfigError: the host gave or pinned less than all of it; everything is given back first.
        """
        self.pages = (num_pages, shape.kv_heads, shape.page_size, 2 * shape.head_dim)
        kept = torch.float8_e4m3fn if shape.in_fp8 else dtype
        size = num_pages * shape.kv_heads * shape.host_head_page_bytes
        self._pinned: dict[int, int] = {}  # bytes by address
        self._memory: list[mmap.mmap] = []
        # For an engine that ends in a process that goes on. At exit the driver lets go of everything itself.
        weakref.finalize(self, _give_back, self._pinned, self._memory).atexit = False
        self.layers: list[torch.Tensor] = []
        total = size * shape.layers
        try:
            for _ in range(shape.layers):
                self._memory.append(_anonymous_memory(size))
            hosts = [torch.frombuffer(memory, dtype=kept).view(self.pages) for memory in self._memory]
            if device.type != "cpu":
                self._pin(hosts)
                hosts = [view_from_device(host) for host in hosts]
            self.layers.extend(hosts)
        except (OSError, RuntimeError) as error:
            pinned = sum(self._pinned.values())
            self.close()
            raise ConfigError(
                f"sparse.offload.host_gib: the host pool of this rank, {total / GIB:.2f} GiB, could not be "
                f"allocated and pinned: {error}, after {pinned / GIB:.2f} GiB; {read_limits()}. "
                f"Lower sparse.offload.host_gib"
            ) from error

    def _pin(self, hosts: list[torch.Tensor]) -> None:
        """Pin every tensor, piece by piece; threads touch the pieces ahead, which pinning would do one by one.

        Seen on a host of 125 GiB: pinning 108 GiB of small pages that nobody had touched took 60 s, of huge
        pages touched so less than 23 s.
        """
        pieces = [piece for host in hosts for piece in host.view(-1).view(torch.uint8).split(PIECE_BYTES)]
        total = sum(map(len, pieces))
        bar = tqdm(
            total=total, desc="Pinning host memory", unit="B", unit_scale=True, unit_divisor=1024,
            disable=total < QUIET_BYTES,
        )  # fmt: skip
        with bar, ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as threads:
            try:
                for piece in threads.map(_touch, pieces):
                    pin(piece.data_ptr(), len(piece))
                    self._pinned[piece.data_ptr()] = len(piece)
                    bar.update(len(piece))
            finally:  # where pinning fails, nothing more needs to be touched
                threads.shutdown(cancel_futures=True)

    @property
    def num_bytes(self) -> int:
        return sum(len(memory) for memory in self._memory)

    def close(self) -> None:
        """Unpin and forget; tensors that were taken from here must not be used any more."""
        self.layers.clear()
        _give_back(self._pinned, self._memory)


def _anonymous_memory(size: int) -> mmap.mmap:
    """Private, for only such memory comes in huge pages wherever a program may ask for them.

    No child inherits it: a fork would have to copy what is pinned.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # advice, which some kernels do not take: pinning is only slower
            memory.madvise(advice)
    return memory


def _touch(piece: torch.Tensor) -> torch.Tensor:
    piece[:: mmap.PAGESIZE].zero_()
    return piece


def _give_back(pinned: dict[int, int], memory: list[mmap.mmap]) -> None:
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

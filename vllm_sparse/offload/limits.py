"""How much memory this host can still give, checked before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.sizing import GIB

AUTO_SHARE = 0.75
"""Share of the free memory that ``host_gib: auto`` takes, before it is rounded down (:func:`_round_down`)."""
RESERVE_BYTES = GIB // 4
"""Memory left to the rest of the process."""
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class HostLimits:
    """Bytes that this process could still use."""

    free_ram: int
    container: int
    """What the memory limit of the control group leaves; ``UNLIMITED`` without one."""
    memlock: int
    """Soft limit of locked memory; ``UNLIMITED`` without one. The NVIDIA driver does not count its pinned
    pages in it on every system, so it is reported where pinning fails, and refuses nothing by itself."""

    @property
    def usable(self) -> int:
        return max(0, min(self.free_ram, self.container) - RESERVE_BYTES)

    def __str__(self) -> str:
        return (
            f"{self.free_ram / GIB:.2f} GiB of RAM are free, the container's limit leaves {_gib(self.container)}, "
            f"locked memory (ulimit -l) is limited to {_gib(self.memlock)}"
        )


def _gib(size: int) -> str:
    return "any amount" if size >= UNLIMITED else f"{size / GIB:.2f} GiB"


def read_limits(root: Path = Path("/")) -> HostLimits:
    """The limits of this process; ``root`` stands in for the file system in tests."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return HostLimits(
        free_ram=_free_ram(root / "proc/meminfo"),
        container=_container(root),
        memlock=UNLIMITED if soft == resource.RLIM_INFINITY else soft,
    )


def _free_ram(meminfo: Path) -> int:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"sparse.offload: {meminfo} does not say how much memory is available")


def _container(root: Path) -> int:
    """Bytes that control groups leave, of version 2 or 1: the least of the group and of all around it."""
    left = UNLIMITED
    groups = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in _lines(root / "proc/self/cgroup")}
    for controller, base, limit, usage, reclaimable in (
        ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "memory",
            "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        if controller not in groups:
            continue
        folder = root / base
        for part in ("", *Path(groups[controller]).parts):
            # A container sees its own group as the root, whatever its path says.
            folder = folder / part.strip("/")
            maximum, used = _number(folder / limit), _number(folder / usage)
            if maximum is None or used is None or maximum >= UNLIMITED:
                continue
            cache = 0
            for line in _lines(folder / "memory.stat"):
                name, _, value = line.partition(" ")
                if name == reclaimable:
                    cache = int(value)
            left = min(left, max(0, maximum - used + cache))
    return left


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def check_host_memory(host_gib: float, ranks: int, limits: HostLimits) -> None:
    """Raise :class:`ConfigError` where this host cannot hold the pools of its ``ranks``."""
    if host_gib * GIB > limits.usable:
        raise ConfigError(
            f"sparse.offload.host_gib: {host_gib:g} GiB of pinned memory for the KV of {ranks} rank(s) on this "
            f"host do not fit: {limits}. Allowed now: up to {limits.usable / GIB:.2f}, or auto"
        )


def _round_down(gib: float) -> float:
    """``gib`` cut to eight to fifteen steps of a power of two: by a ninth at most, on hosts of any size."""
    step = 2.0 ** math.floor(math.log2(gib / 8))
    return gib // step * step


def resolve_host_gib(host_gib: float | str, ranks: int, limits: HostLimits) -> float:
    """``host_gib`` as a number that this host can give to its ``ranks`` together.

    ``auto`` is rounded down, so that starts on the same host mostly find the same number although its free
    memory varies: it is part of the config, by whose hash vLLM finds what it compiled before.
    """
    if host_gib == "auto":
        if limits.usable == 0:
            raise ConfigError(f"sparse.offload.host_gib: auto finds no memory that is free: {limits}")
        return _round_down(AUTO_SHARE * limits.usable / GIB)
    check_host_memory(host_gib, ranks, limits)
    return float(host_gib)

"""Offload over several hosts: each gives its ranks together what was asked for, however ranks are spread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_sparse.backend import offload
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.limits import UNLIMITED, HostLimits


def worker_of(monkeypatch, hosts: list[str], rank: int, engines_of_host: int = 1, world_size: int | None = None):
    """Rank ``rank`` of a world whose ranks are on ``hosts``."""
    group = SimpleNamespace(world_size=len(hosts), cpu_group=None)
    monkeypatch.setattr(offload, "get_world_group", lambda: group)
    monkeypatch.setattr(offload, "host_id", lambda: hosts[rank])

    def gather(found, mine, group):
        assert mine == hosts[rank]
        found[:] = hosts

    monkeypatch.setattr(offload.torch.distributed, "all_gather_object", gather)
    # As ray leaves it: one node, whatever the cluster has.
    parallel = SimpleNamespace(
        world_size=world_size or len(hosts), nnodes=1, data_parallel_size_local=engines_of_host
    )
    sparse = {"offload": {"host_gib": 8}}
    return SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=parallel, additional_config={"sparse": sparse})
    )


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(offload, "read_limits", lambda: HostLimits(64 << 30, UNLIMITED, UNLIMITED))


@pytest.mark.parametrize(
    ("hosts", "shares"), [("aabb", [2] * 4), ("aaab", [3, 3, 3, 1]), ("abcd", [1] * 4), ("aaaa", [4] * 4)]
)
def test_each_host_gives_its_ranks_what_was_asked_for(monkeypatch, roomy, hosts, shares):
    for rank, ranks in enumerate(shares):
        worker = worker_of(monkeypatch, list(hosts), rank)
        config = offload.SparseConfig.from_vllm(worker.vllm_config)
        assert offload._host_bytes(worker, config) == (8 << 30) // ranks
        monkeypatch.setattr(offload, "get_world_group", None)  # asked once
        assert offload.ranks_on_this_host(worker) == ranks


def test_data_parallel_engines_share_a_host(monkeypatch, roomy):
    assert offload.ranks_on_this_host(worker_of(monkeypatch, ["a", "a"], 0, engines_of_host=2)) == 4
    in_one_world = worker_of(monkeypatch, list("aabb"), 0, engines_of_host=1, world_size=2)
    assert offload.ranks_on_this_host(in_one_world) == 2


def test_a_host_with_too_little_memory_stops_the_start(monkeypatch):
    monkeypatch.setattr(offload, "read_limits", lambda: HostLimits(6 << 30, UNLIMITED, UNLIMITED))
    with pytest.raises(ConfigError, match=r"host_gib: 8 GiB of pinned memory for the KV of 2 rank"):
        offload.ranks_on_this_host(worker_of(monkeypatch, list("aabb"), 3))


def test_this_machine_has_an_id():
    assert len(offload.host_id()) == 36

"""Faults: too little host memory, pinning that fails half-way, and schedules that fight over a small pool."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.e4m3 import kept
from vllm_sparse.offload import limits, pool
from vllm_sparse.offload.limits import UNLIMITED, HostLimits, read_limits, resolve_host_gib
from vllm_sparse.offload.pool import HostPool
from vllm_sparse.offload.sizing import GIB, CacheShape, Split, StepLimits, split_memory
from vllm_sparse.offload.store import OffloadStore
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_table import PageTable

PAGE, HEADS, HEAD_DIM, LAYERS = 16, 2, 16, 2
SHAPE = CacheShape(LAYERS, HEADS, HEAD_DIM, PAGE, 4, 1)
GEOMETRY = Geometry(HEADS, HEADS, HEAD_DIM, PAGE, 1.0)
CPU = torch.device("cpu")

# Settings of offload, and what the refusal must say.
WRONG = {
    "not_an_object": (
        {"offload": 64},
        ["sparse.offload", "an object of host_gib, hot_fraction, host_dtype", "64"],
    ),
    "unknown_key": ({"offload": {"host_gb": 64}}, ["'host_gb' in sparse.offload", "Did you mean 'host_gib'?"]),
    "no_memory": ({"offload": {"host_gib": 0}}, ["sparse.offload.host_gib: 0", "above 0"]),
    "text": ({"offload": {"host_gib": "64"}}, ["sparse.offload.host_gib: '64'", "auto"]),
    "bool": ({"offload": {"host_gib": True}}, ["sparse.offload.host_gib: True"]),
    "not_a_number": ({"offload": {"host_gib": float("nan")}}, ["sparse.offload.host_gib: nan"]),
    "all_hot": ({"offload": {"hot_fraction": 1}}, ["sparse.offload.hot_fraction: 1", "below 1"]),
    "dense_layers": ({"offload": {}, "dense_layers": 2}, ["sparse.dense_layers: 2", "allowed with offload: 0"]),
    "dense": ({"offload": {}, "decode_policy": "dense"}, ["sparse.decode_policy: 'dense'", "on the host"]),
    "recall monitor": (
        {"offload": {}, "recall_monitor_every_steps": 8},
        ["sparse.recall_monitor_every_steps: 8", "with offload: 0"],
    ),
    "oracle": ({"offload": {}, "decode_policy": "oracle"}, ["sparse.decode_policy: 'oracle'", "on the host"]),
    "engine": (
        {"offload": {}, "attention_kernel": "fa3"},
        ["sparse.attention_kernel: 'fa3'", "auto, triton, torch"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_by_name(case):
    settings, said = WRONG[case]
    with pytest.raises(ConfigError) as refusal:
        SparseConfig.from_mapping(settings, "test")
    for words in said:
        assert words in str(refusal.value)


def test_dense_layers_default_to_2_on_the_gpu_and_to_0_with_offload():
    assert SparseConfig().dense_layers == 2
    config = SparseConfig.from_mapping({"offload": {"host_gib": 3}}, "test")
    assert config.dense_layers == 0 and config.offload.host_gib == 3
    assert SparseConfig.from_mapping(config.to_mapping(), "a worker") == config
    assert SparseConfig.from_mapping({"offload": None, "dense_layers": None}, "test") == SparseConfig()


def host(tmp_path, files: dict[str, str]):
    for name, text in {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_limits(tmp_path)


V2 = {
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/pod/memory.stat": "file 5\ninactive_file 4096\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/box/memory.current": "7\n",
}
V1 = {
    "proc/self/cgroup": "9:memory:/box\n3:cpu:/box\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB // 2),
}


def test_limits_of_the_host_and_its_containers(tmp_path):
    assert host(tmp_path / "bare", {}).container == UNLIMITED
    found = host(tmp_path / "v2", V2)
    assert found.free_ram == 8 * GIB and found.container == GIB + 4096
    assert found.usable < GIB
    assert host(tmp_path / "v1", V1).container == GIB * 3 // 2
    assert read_limits().free_ram > 0


def test_host_memory_of_all_ranks_together_must_be_free():
    found = HostLimits(free_ram=10 * GIB, container=UNLIMITED, memlock=1 << 16)
    assert resolve_host_gib(9, 2, found) == 9
    assert resolve_host_gib("auto", 2, found) == 7
    with pytest.raises(ConfigError, match=r"host_gib: 11 GiB .* 2 rank.* 10.00 GiB of RAM .* up to 9.75"):
        resolve_host_gib(11, 2, found)
    small = HostLimits(free_ram=10 * GIB, container=3 * GIB, memlock=UNLIMITED)
    with pytest.raises(ConfigError, match=r"the container's limit leaves 3.00 GiB"):
        resolve_host_gib(9, 1, small)


def test_auto_is_the_same_number_where_free_memory_varies_a_little():
    def auto(free_gib: float, container_gib: float | None = None) -> float:
        container = UNLIMITED if container_gib is None else int(container_gib * GIB)
        return resolve_host_gib("auto", 1, HostLimits(int(free_gib * GIB), container, UNLIMITED))

    assert {auto(free) for free in (118.3, 119, 120.7, 122)} == {88}
    assert {auto(free) for free in (1960, 1991.4, 2013)} == {1408}
    assert {auto(2013, limit) for limit in (15.1, 15.6, 16)} == {11}
    for hundredths in range(26, 5000, 7):  # down to a hundredth of a GiB beside the reserve
        most = 0.75 * (int(hundredths * GIB / 100) - GIB // 4) / GIB
        assert 8 / 9 * most < auto(hundredths / 100) <= most
    with pytest.raises(ConfigError, match=r"auto finds no memory that is free: 0.25 GiB of RAM"):
        auto(0.25)


def test_pinning_that_fails_half_way_gives_everything_back(monkeypatch):
    """As on a GPU, whose driver this stands in for: pieces are pinned one by one, and the sixth is refused."""
    pinned = []

    def pin(address, size):
        if len(pinned) == 5:
            raise RuntimeError("cudaHostRegister of 0.00 GiB: out of memory")
        assert 0 < size <= pool.PIECE_BYTES
        pinned.append(address)

    monkeypatch.setattr(pool, "pin", pin)
    monkeypatch.setattr(pool, "unpin", pinned.remove)
    monkeypatch.setattr(pool, "view_from_device", lambda tensor: tensor)
    monkeypatch.setattr(pool, "PIECE_BYTES", 4096)
    with pytest.raises(ConfigError) as refusal:
        HostPool(SHAPE, 8, torch.float32, torch.device("cuda"))
    assert not pinned
    for words in ("sparse.offload.host_gib", "out of memory", "GiB of RAM are free", "ulimit -l", "Lower"):
        assert words in str(refusal.value)
    monkeypatch.setattr(pool, "PIECE_BYTES", GIB)
    again = HostPool(SHAPE, 8, torch.float32, torch.device("cuda"))
    assert len(pinned) == LAYERS
    del again  # an engine that ends
    assert not pinned


def test_memory_that_is_not_given_is_refused(monkeypatch):
    def no_memory(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pool.mmap, "mmap", no_memory)
    with pytest.raises(ConfigError, match=r"could not be allocated and pinned: .*Cannot allocate memory"):
        HostPool(SHAPE, 8, torch.float32, CPU)


def on_host(layer, head_pages) -> torch.Tensor:
    """K and V that the host holds of head pages."""
    by_head_page = None if layer.exponents is None else layer.exponents.flatten(0, 1)
    return kept(layer.host.flatten(0, 1), by_head_page, head_pages, torch.float32)


class Schedule:
    """A store under a scheduler of its own: requests arrive, are chunked, decode, are preempted and aborted.

    Contents are functions of (request, position), so every page that a step reads can be checked: in slots,
    on the host, in a context buffer. Blocks of requests that are gone are handed out again at once.
    """

    def __init__(self, seed: int, host_dtype: str):
        self.random, self.coded = random.Random(seed), host_dtype == "fp8"
        shape = replace(SHAPE, host_dtype=host_dtype)
        self.num_blocks = self.random.choice([12, 20, 28])
        slots = self.random.choice([0, 16, 32])
        self.step = StepLimits(max_num_reqs=4, max_num_tokens=64, max_context_tokens=160, table_pages=4)
        self.store = OffloadStore(shape, self.step, Split(self.num_blocks, slots), torch.float32, CPU)
        for layer in self.store.layers:
            layer.host.fill_(float("nan"))
        self.store.hot.fill_(float("nan"))
        self.summaries = [torch.zeros(self.num_blocks, HEADS, 1, 2 * HEAD_DIM) for _ in range(LAYERS)]
        self.free = list(range(1, self.num_blocks))
        self.running: dict[int, dict] = {}
        self.waiting: dict[int, dict] = {}
        self.born = 0
        self.seen = {"preempt": 0, "abort": 0, "hit": 0, "fetch": 0}

    def content(self, request: dict, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """[positions, heads, 2 * head_dim]: distinct everywhere, exact in float32 or in codes of growing size."""
        lane = torch.arange(HEADS * 2 * HEAD_DIM).view(HEADS, 2 * HEAD_DIM)
        if self.coded:
            head, cell = lane // (2 * HEAD_DIM), lane % (2 * HEAD_DIM)
            number = ((request["id"] % 97) * 160 + positions[:, None, None]) * LAYERS + layer
            digits = (number >> 3 * ((cell + head) % 5)) % 8 + 8 * (cell >= HEAD_DIM)
            return digits * 2.0 ** (positions % 7)[:, None, None]
        return ((request["id"] % 97) * 160 + positions[:, None, None]).float() * 64 + lane + layer * 0.25

    def arrive(self) -> None:
        self.born += 1
        self.waiting[self.born] = {"id": self.born, "goal": self.random.randint(2, 150), "done": 0, "blocks": []}

    def leave(self, number: int, why: str) -> None:
        request = self.running.pop(number)
        self.free += request["blocks"]
        self.random.shuffle(self.free)
        request |= {"blocks": [], "done": 0}
        self.seen[why] = self.seen.get(why, 0) + 1
        if why == "preempt":
            self.waiting[number] = request

    def grow(self, number: int, tokens: int) -> bool:
        """Blocks for ``tokens`` more of a request, at the cost of others; False where it had to go itself."""
        request = self.running[number]
        while -(-(request["done"] + tokens) // PAGE) > len(request["blocks"]):
            if not self.free:
                victim = list(self.running)[-1]
                self.leave(victim, "preempt")
                if victim == number:
                    return False
            else:
                request["blocks"].append(self.free.pop())
        return True

    def run_step(self) -> None:
        """One step: a token of each request that decodes, a chunk of each that does not."""
        if self.waiting and len(self.running) < 4:
            number = min(self.waiting)
            self.running[number] = self.waiting.pop(number)
        room, work = 64, {}
        for number in list(self.running):
            if number not in self.running or not room:
                continue
            request = self.running[number]
            decodes = request["done"] > 20 and self.random.random() < 0.7
            tokens = 1 if decodes else min(room, self.random.randint(1, 40), request["goal"] - request["done"])
            if self.grow(number, tokens):
                work[number] = tokens
                room -= tokens
        work = {number: tokens for number, tokens in work.items() if number in self.running}
        self.compute({n: t for n, t in work.items() if t == 1} | {n: t for n, t in work.items() if t > 1})
        for number, tokens in work.items():
            self.running[number]["done"] += tokens
            if self.running[number]["done"] >= self.running[number]["goal"]:
                self.leave(number, "finish")

    def compute(self, work: dict[int, int]) -> None:
        requests = [self.running[number] for number in work]
        positions = [torch.arange(r["done"], r["done"] + n) for r, n in zip(requests, work.values(), strict=True)]
        slots = [
            torch.tensor(r["blocks"])[p // PAGE] * PAGE + p % PAGE
            for r, p in zip(requests, positions, strict=True)
        ]
        if not slots:
            return
        slots = torch.cat([*slots, torch.full((self.random.randint(0, 2),), -1)])[: self.step.max_num_tokens]
        decodes = [request for request, tokens in zip(requests, work.values(), strict=True) if tokens == 1]
        for layer in self.store.layers:
            kv = torch.cat([self.content(r, layer.index, p) for r, p in zip(requests, positions, strict=True)])
            kv = torch.cat([kv, torch.full((len(slots) - len(kv), HEADS, 2 * HEAD_DIM), float("inf"))])
            key, value = kv.split(HEAD_DIM, -1)
            layer.write(key, value, slots, self.summaries[layer.index], "key_range", GEOMETRY)
            self.decode(layer, decodes)
            self.read_contexts(layer, requests[len(decodes) :])

    def decode(self, layer, requests: list[dict]) -> None:
        """Choose pages for each request and head, have them brought, and check what was brought."""
        table = PageTable.empty(len(requests), HEADS, self.step.table_pages, CPU)
        chosen = []
        for row in range(len(requests) * HEADS):
            request = requests[row // HEADS]
            last = request["done"] // PAGE
            pages = [*sorted(self.random.sample(range(last), min(last, 3))), last]
            chosen.append(pages)
            head_pages = torch.tensor(request["blocks"])[pages] * HEADS + row % HEADS
            table.head_pages[row, : len(pages)] = head_pages.int()
            table.lengths[row] = (len(pages) - 1) * PAGE + request["done"] % PAGE + 1
        before = self.store.lookups.counters.clone()
        layer.bring(table)
        looked_up, fetched, in_place = (self.store.lookups.counters - before).tolist()
        self.seen["hit"] += looked_up - fetched - in_place
        self.seen["fetch"] += fetched
        hot = layer.hot[:, :, :PAGE].flatten(0, 1)
        for row, pages in enumerate(chosen):
            request, head = requests[row // HEADS], row % HEADS
            for page, head_page in zip(pages, table.head_pages[row].tolist(), strict=False):
                found = hot[head_page] if head_page >= 0 else on_host(layer, ~head_page)
                rows = min(PAGE, request["done"] + 1 - page * PAGE)
                expected = self.content(request, layer.index, page * PAGE + torch.arange(rows))[:, head]
                assert torch.equal(found[:rows], expected), f"page {page} of request {request['id']}"

    def read_contexts(self, layer, requests: list[dict]) -> None:
        """What prefill reads back of complete pages."""
        for request in requests:
            old = request["done"] // PAGE
            out = torch.full((old + 1, HEADS, PAGE, 2 * HEAD_DIM), float("nan"))
            blocks, places = torch.tensor(request["blocks"][:old], dtype=torch.int32), torch.arange(old)
            reference.read_pages(layer.host, blocks, out, places, 4, layer.exponents)
            expected = self.content(request, layer.index, torch.arange(old * PAGE))
            assert torch.equal(out[:old].transpose(1, 2).flatten(0, 1), expected)

    def check(self) -> None:
        """No block or slot is lost, and nobody can find a head page that is not what its block holds."""
        owned = [block for request in self.running.values() for block in request["blocks"]]
        assert sorted(owned + self.free) == list(range(1, self.num_blocks))
        for layer in self.store.layers:
            hot_set = layer.hot_set
            held = torch.nonzero(hot_set.slot_of >= 0).squeeze(1)
            slots = hot_set.slot_of[held].long()
            assert len(slots.unique()) == len(slots)
            assert torch.equal(hot_set.slot_head_page[slots].long(), held)
            hot = layer.hot[:, :, :PAGE].flatten(0, 1)[hot_set.first_head_page + slots]
            assert torch.equal(hot, on_host(layer, held))


@pytest.mark.parametrize("host_dtype, part", [*(("auto", part) for part in range(4)), ("fp8", 0)])
def test_random_schedules_leave_no_stale_page_and_lose_no_block(host_dtype, part):
    """1,000 schedules of a pool that is too small, and 250 in fp8: every page read is the one that was written."""
    seen: dict[str, int] = {}
    for seed in range(part * 250, part * 250 + 250):
        schedule = Schedule(seed, host_dtype)
        for _ in range(10):
            if schedule.random.random() < 0.6:
                schedule.arrive()
            if schedule.running and schedule.random.random() < 0.1:
                schedule.leave(schedule.random.choice(list(schedule.running)), "abort")
            schedule.run_step()
        schedule.check()
        for event, count in schedule.seen.items():
            seen[event] = seen.get(event, 0) + count
    assert all(seen[event] > 40 for event in ("preempt", "abort", "finish", "hit", "fetch")), seen


def test_memory_is_shared_out_to_the_last_page():
    step = StepLimits(8, 256, 1024, 64)
    gpu, blocks = 64 << 20, 900
    split = split_memory(SHAPE, step, gpu, blocks * SHAPE.host_block_bytes + 5, "auto")
    assert split.num_blocks == blocks and split.slots_per_layer == -(-blocks * HEADS // 16) * 16
    # A GPU that is the narrower: a quarter is left for hot head pages.
    gpu = step.fixed_bytes(SHAPE) + 400 * (SHAPE.gpu_block_bytes + SHAPE.map_block_bytes)
    split = split_memory(SHAPE, step, gpu, 10**9, "auto")
    assert split.num_blocks == 300
    used = split.num_blocks * (SHAPE.gpu_block_bytes + SHAPE.map_block_bytes) + step.fixed_bytes(SHAPE)
    assert used + split.slots_per_layer * LAYERS * SHAPE.slot_bytes <= gpu
    with pytest.raises(ConfigError, match=r"--max-model-len 1024 needs .* host memory"):
        split_memory(SHAPE, step, gpu, 20 * SHAPE.host_block_bytes, "auto")
    assert limits.AUTO_SHARE < 1

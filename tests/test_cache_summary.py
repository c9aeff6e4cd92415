"""Summary rows stay those of their pages, whatever vLLM's own block manager does with the pages."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

pytest.importorskip("vllm")

from tiny_engine import attention_layers, kv_cache, outputs, prompts, tokens
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_sparse.backend.impl import SparseImpl
from vllm_sparse.backend.spec import PageLayout, SparseAttentionSpec
from vllm_sparse.kernels import reference
from vllm_sparse.pages.summaries import TILE_TOKENS

PAGE, HEADS, HEAD_DIM = 16, 2, 16
NUM_BLOCKS, MAX_LEN = 24, 192
EVENTS = ("arrive", "chunk", "decode", "preempt", "resume", "abort", "finish", "hit", "reuse", "reject")


def decoded(kv: torch.Tensor, page_size: int, summary: str) -> tuple[torch.Tensor, ...]:
    """What the summaries of ``kv`` say."""
    if summary == "key_range":
        return reference.key_range(kv, page_size)
    return reference.sketched_keys(kv, page_size, summary)


def assert_summaries(kv: torch.Tensor, filled: dict[int, int], page_size: int, summary: str) -> None:
    """The summary of each full page, or tile, is what writing its keys anew gives.

    ``filled``: rows of each block.
    """
    head_dim = kv.shape[-1] // 2
    unit = page_size if summary == "key_range" else TILE_TOKENS
    for rows in {rows // unit * unit for rows in filled.values()} - {0}:
        blocks = [block for block, last in filled.items() if last // unit * unit == rows]
        keys = kv[blocks, :, :rows, :head_dim].transpose(1, 2).flatten(0, 1)
        assert not keys.isnan().any(), f"one of the blocks {blocks} was never written"
        fresh = torch.zeros_like(kv[blocks])
        slots = torch.arange(len(blocks))[:, None] * page_size + torch.arange(rows)
        reference.page_write(keys, keys, fresh, slots.flatten(), page_size, summary)
        found, expected = (decoded(x, page_size, summary) for x in (kv[blocks], fresh))
        if summary != "key_range":
            found, expected = ([x[:, :, :rows] for x in part] for part in (found, expected))
        assert all(map(torch.equal, found, expected)), f"summary of one of the blocks {blocks}"


class EngineWrites:
    """Records which rows of each block an engine's last write to it filled, and checks them all."""

    def __init__(self, monkeypatch):
        self.filled: dict[int, int] = {}
        write = SparseImpl.do_kv_cache_update

        def record(impl, layer, key, value, kv, slots):
            write(impl, layer, key, value, kv, slots)
            blocks: dict[int, int] = {}
            for slot in slots[slots >= 0].tolist():
                block, row = divmod(slot, impl.page_size)
                blocks[block] = max(blocks.get(block, 0), row + 1)
            self.filled |= blocks

        monkeypatch.setattr(SparseImpl, "do_kv_cache_update", record)

    def check(self, llm) -> Counter:
        """Check every page in every sparse layer; returns how many pages of each fill there are."""
        for layer in attention_layers(llm).values():
            if not isinstance(layer.impl, SparseImpl):
                continue
            assert_summaries(kv_cache(layer), self.filled, layer.impl.page_size, layer.impl.layout.summary)
        return Counter(self.filled.values())


def spec_of(page_size: int = PAGE, summary: str = "key_range", **changes) -> SparseAttentionSpec:
    shape = {"num_kv_heads": HEADS, "head_size": HEAD_DIM, "dtype": torch.float32, **changes}
    return SparseAttentionSpec.extend(
        FullAttentionSpec(block_size=page_size, **shape), page_size, PageLayout(summary)
    )


class Worker:
    """vLLM's block manager over sparse pages, and a scheduler and a worker small enough to randomise."""

    def __init__(self, seed: int, summary: str = "key_range"):
        self.summary = summary
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        spec = spec_of(summary=summary)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, MAX_LEN, scheduler_block_size=PAGE, hash_block_size=PAGE)
        self.kv = torch.full((NUM_BLOCKS, HEADS, PAGE + spec.summary_slots, 2 * HEAD_DIM), float("nan"))
        self.filled: dict[int, int] = {}
        """Rows of each block that its last writer filled; a block's pages outlive its requests."""
        self.owners: dict[int, str] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.prefixes = [[self.random.randrange(90) for _ in range(80)] for _ in range(2)]
        self.seen: Counter[str] = Counter()

    def arrive(self) -> None:
        shared = self.random.choice([0, 15, 16, 40, 64, 80])
        tail = [self.random.randrange(90) for _ in range(self.random.randint(1, 60))]
        request = Request(
            str(self.seen["arrive"]), self.random.choice(self.prefixes)[:shared] + tail,
            SamplingParams(max_tokens=64), None, block_hasher=self.hasher,
        )  # fmt: skip
        self.waiting.append(request)
        self.seen["arrive"] += 1

    def schedule(self) -> None:
        """One step: each running request computes a random part of what it lacks."""
        for request in list(self.running):
            if request in self.running:
                self.compute(request)
        if self.waiting and len(self.running) < 4:
            self.admit(self.waiting[0])

    def admit(self, request: Request) -> None:
        blocks, hits, *_ = self.manager.get_computed_blocks(request)
        new = self.random.randint(1, request.num_tokens - hits)
        if self.manager.allocate_slots(request, new, hits, blocks) is None:
            return
        self.waiting.remove(request)
        self.running.append(request)
        self.seen["resume"] += request.status == RequestStatus.PREEMPTED
        self.seen["hit"] += hits > 0
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hits
        self.write(request, new)

    def compute(self, request: Request) -> None:
        lacking = request.num_tokens - request.num_computed_tokens
        new = self.random.randint(1, lacking)
        # A draft of up to three tokens, of which all may be rejected.
        drafts = self.random.choice([0, 0, 3]) if lacking == new else 0
        drafts = min(drafts, MAX_LEN - request.num_tokens)
        while self.manager.allocate_slots(request, new + drafts) is None:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return
        self.write(request, new, drafts)

    def write(self, request: Request, new: int, drafts: int = 0) -> None:
        """What the worker does for ``new`` tokens, and the scheduler afterwards."""
        start = request.num_computed_tokens
        positions = torch.arange(start, start + new + drafts)
        (blocks,) = self.manager.get_block_ids(request.request_id)
        for page in positions.div(PAGE, rounding_mode="floor").unique().tolist():
            owner = f"{request.request_id}/{request.num_preemptions}/{page}"
            self.seen["reuse"] += self.owners.get(blocks[page], owner) != owner
            self.owners[blocks[page]] = owner
            self.filled[blocks[page]] = min(PAGE, start + new + drafts - page * PAGE)
        slots = torch.tensor(blocks)[positions // PAGE] * PAGE + positions % PAGE
        slots = torch.cat([slots, torch.tensor([-1, -1])])
        key, value = torch.randn(2, len(slots), HEADS, HEAD_DIM, generator=self.generator)
        reference.page_write(key, value, self.kv, slots, PAGE, self.summary)
        request.num_computed_tokens += new
        finished_prompt = request.num_computed_tokens == request.num_tokens
        self.seen["chunk"] += not finished_prompt
        self.seen["decode"] += new == 1 and finished_prompt
        self.seen["reject"] += drafts > 0
        if finished_prompt:
            request.append_output_token_ids(self.random.randrange(90))
            if request.num_tokens >= MAX_LEN or self.random.random() < 0.02:
                self.finish(request, "finish")

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        self.running.remove(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.insert(0, request)
        self.seen["preempt"] += 1

    def finish(self, request: Request, event: str) -> None:
        self.manager.free(request)
        self.running.remove(request)
        self.seen[event] += 1

    def check(self) -> None:
        live = {}
        for request in self.running:
            (blocks,) = self.manager.get_block_ids(request.request_id)
            pages = -(-request.num_computed_tokens // PAGE)
            # A page that rejected drafts filled is summarised with them until it is filled again.
            live |= {block: self.filled[block] for block in blocks[:pages]}
            assert all(self.filled[block] == PAGE for block in blocks[: pages - 1])
        cached = {block.block_id: PAGE for block in self.manager.block_pool.blocks if block.block_hash is not None}
        assert self.kv[0].isnan().all(), "the null block was written"
        assert_summaries(self.kv, cached | live, PAGE, self.summary)
        self.seen["checked"] += len(cached | live)


@pytest.mark.parametrize("seed, summary", [*((seed, "key_range") for seed in range(20)), (20, "sketch2")])
def test_summaries_survive_random_schedules(seed, summary):
    worker = Worker(seed, summary)
    for _ in range(300):
        draw = worker.random.random()
        if draw < 0.12 and len(worker.waiting) < 3:
            worker.arrive()
        elif draw < 0.14 and worker.running:
            worker.finish(worker.random.choice(worker.running), "abort")
        worker.schedule()
        worker.check()
    assert worker.seen["checked"] > 1000
    assert not [event for event in EVENTS if not worker.seen[event]], worker.seen


@pytest.mark.seam
@pytest.mark.engine
@pytest.mark.parametrize("policy, page_size", [("midbound", 16), ("midbound", 64), ("sketch2", 32)])
def test_engine_writes_every_summary(tiny, policy, page_size, monkeypatch):
    """Chunked prefill, decode and prefix hits of a real engine, partly filled pages included."""
    lengths = (50, 300, 700)
    batch = prompts(lengths, seed=7)
    writes = EngineWrites(monkeypatch)
    with tiny.start(sparse={"budget_tokens": 2048, "decode_policy": policy}, block_size=page_size) as llm:
        tokens(llm, batch, 40)
        fills = writes.check(llm)
        assert fills[page_size] == sum((length + 39) // page_size for length in lengths)
        assert fills.total() > fills[page_size], "no page is partly filled"
        (result,) = outputs(llm, [batch[1][:200] + batch[0] * 5], 4)
        assert result.num_cached_tokens == 200 // page_size * page_size
        assert writes.check(llm)[page_size] == fills[page_size] + 453 // page_size - 200 // page_size


@pytest.mark.seam
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_page_bytes_count_the_summary(page_size):
    spec = spec_of(page_size)
    assert spec.page_size_bytes == HEADS * (page_size + 1) * 2 * HEAD_DIM * 4
    plain = FullAttentionSpec(block_size=page_size, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    assert plain.page_size_bytes == HEADS * page_size * 2 * HEAD_DIM * 4, "vLLM's own spec was changed"


@pytest.mark.seam
def test_specs_merge_only_when_equal():
    assert SparseAttentionSpec.merge([spec_of(), spec_of()]) == spec_of()
    with pytest.raises(AssertionError, match="same sparse pages"):  # how vLLM asks whether layers are alike
        SparseAttentionSpec.merge([spec_of(), spec_of(num_kv_heads=4)])

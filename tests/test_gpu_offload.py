"""Offload on a GPU: pinned memory, CUDA graphs, both model runners, prefetch, no waiting for the device."""

from __future__ import annotations

import pytest
import torch
from cases import ON_GPU, TOLERANCE, error
from test_gpu_engine import DRAFTS, GRAPHS, answer, assert_same, other_runner  # noqa: F401

from vllm_sparse.kernels.reference.e4m3 import kept
from vllm_sparse.pages.geometry import Geometry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

RESIDENT = {"budget_tokens": 512, "min_context_tokens": 1024, "dense_layers": 0}
OFFLOAD = {**RESIDENT, "dense_layers": None, "offload": {"host_gib": 0.5}}
FEW_SLOTS = {**OFFLOAD, "offload": {"host_gib": 0.5, "hot_fraction": 0.01}}
NO_SLOTS = {**OFFLOAD, "offload": {"host_gib": 0.5, "hot_fraction": 0}}
HEAD_PAGE_BYTES = 16 * 2 * 64 * 4
FP8 = {**OFFLOAD, "offload": {"host_gib": 0.5, "host_dtype": "fp8"}}
FP8_NO_SLOTS = {**OFFLOAD, "offload": {**FP8["offload"], "hot_fraction": 0}}


def store_of(llm):
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl.pages.offloaded for layer in layers if hasattr(layer, "impl")]


def assert_store(llm) -> None:
    """Slots hold what the pinned pool holds."""
    torch.cuda.synchronize()
    for part in store_of(llm):
        hot_set, page_size = part.hot_set, part.host.shape[2]
        held = torch.nonzero(hot_set.slot_of >= 0).squeeze(1)
        slots = hot_set.slot_of[held].long()
        assert len(slots.unique()) == len(slots)
        assert torch.equal(hot_set.slot_head_page[slots].long(), held)
        hot = part.hot[:, :, :page_size].flatten(0, 1)[hot_set.first_head_page + slots]
        by_head_page = None if part.exponents is None else part.exponents.flatten(0, 1)
        on_host = kept(part.host.flatten(0, 1), by_head_page, held, hot.dtype)
        assert torch.equal(hot.float(), on_host.float()) and bool(len(held)) == bool(hot_set.num_sets)


@pytest.mark.parametrize("sparse", [OFFLOAD, FEW_SLOTS, NO_SLOTS], ids=["auto", "few_slots", "no_slots"])
def test_tokens_of_resident_mode(answer, sparse):  # noqa: F811
    found = answer(sparse, compilation_config=GRAPHS, see=assert_store)
    assert_same(found, answer(RESIDENT, compilation_config=GRAPHS))
    counts = found.counts
    assert counts["attended_tokens"] < 0.7 * counts["context_tokens"]
    assert counts["head_page_bytes"] == HEAD_PAGE_BYTES
    moved = counts["head_pages_fetched"] + counts["head_pages_in_place"]
    assert 0 < moved <= counts["head_pages_looked_up"]
    assert (counts["head_pages_in_place"] == counts["head_pages_looked_up"]) == (sparse is NO_SLOTS)


@pytest.mark.parametrize("sparse", [FP8, FP8_NO_SLOTS], ids=["slots", "no_slots"])
def test_fp8_pool(answer, sparse):  # noqa: F811
    """With CUDA graphs as without; and with head pages in slots as with all of them read in place."""
    found = answer(sparse, compilation_config=GRAPHS, see=assert_store)
    assert_same(found, answer(FP8))
    counts = found.counts
    assert counts["head_page_bytes"] == HEAD_PAGE_BYTES // 4
    assert (counts["head_pages_in_place"] == counts["head_pages_looked_up"] > 0) == (sparse is FP8_NO_SLOTS)


def test_exact_fp8_pool(answer, codable):  # noqa: F811
    """Where codes are exact, a pool in fp8 gives the tokens of resident mode."""
    settings = {"variant": "codable", "compilation_config": GRAPHS}
    assert_same(answer(FP8, **settings), answer(RESIDENT, **settings))


@pytest.mark.parametrize("group, head_dim, page_size", [(4, 128, 16), (7, 64, 32), (3, 96, 16)])
def test_fp8_in_place(group, head_dim, page_size):
    """Only on a GPU: Triton's interpreter multiplies bf16 wrongly. Half of the head pages are in slots."""
    from offload_cases import chosen_pages, make_store

    from vllm_sparse.kernels import launchers, reference

    store = make_store(40, 2, head_dim, page_size, dtype=torch.bfloat16, fp8=True)
    store.exponents.fill_(119)
    store.hot.copy_(torch.randn(store.hot.shape))
    table = chosen_pages(store, [[*range(30)], [], [3, 4]], 32)
    table.head_pages[:2, :15] = ~table.head_pages[:2, :15]
    table.head_pages[:2, 15:30] = torch.arange(15, device="cuda") % store.hot.shape[0]
    table.head_pages[4:] = ~table.head_pages[4:]
    q = torch.randn(3, 2 * group, head_dim, device="cuda", dtype=torch.bfloat16)
    out, expected = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    arguments = (q, store.hot, table, Geometry.of(q, store.hot, page_size, head_dim**-0.5))
    launchers.sparse_decode(*arguments, out, store.host, store.exponents)
    reference.sparse_decode(*arguments, expected, store.host, store.exponents)
    assert out[1].isnan().all() and error(out[[0, 2]], expected[[0, 2]]) < TOLERANCE[torch.bfloat16]


def test_graphs_replay_eager(answer):  # noqa: F811
    assert_same(answer(OFFLOAD, compilation_config=GRAPHS, see=assert_store), answer(OFFLOAD))


def test_piecewise_graphs(answer, monkeypatch):  # noqa: F811
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # vLLM cuts its graph in pieces by compiling it
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    both = {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 64, 512]}
    # Every page: compiled code rounds differently, and among pages of random keys that would choose others.
    every_page = {**OFFLOAD, "budget_tokens": 4096}
    assert_same(answer(every_page, compilation_config=both), answer(every_page))


def test_both_model_runners(answer, monkeypatch):  # noqa: F811
    settings = {"compilation_config": GRAPHS, "see": assert_store}
    assert_same(other_runner(answer, monkeypatch, OFFLOAD, **settings), answer(OFFLOAD, **settings))


def test_sparse_prefill(answer):  # noqa: F811
    prefill = {"prefill_policy": "vertical_slash", "min_prefill_tokens": 256, "prefill_top_p": 0,
               "vertical_tokens": 128, "slash_tokens": 256}  # fmt: skip
    assert_same(answer({**OFFLOAD, **prefill}), answer({**RESIDENT, **prefill}))


def test_drafts(answer):  # noqa: F811
    """Pages that a step's drafts go to are attended where they are staged."""
    resident, offload = (
        answer(sparse, compilation_config=GRAPHS, speculative_config=DRAFTS) for sparse in (RESIDENT, FEW_SLOTS)
    )
    assert_same(offload, resident)
    assert offload.counts["attended_tokens"] < 0.7 * offload.counts["context_tokens"]
    assert not offload.waits, offload.waits[:3]


@pytest.mark.parametrize("sparse", [OFFLOAD, FP8], ids=["as_in_the_cache", "fp8"])
@pytest.mark.parametrize("graphs", [{}, {"compilation_config": GRAPHS}], ids=["eager", "graphs"])
def test_nothing_waits_for_the_device(answer, sparse, graphs):  # noqa: F811
    waits = answer(sparse, **graphs).waits
    assert not waits, waits[:3]


def test_failed_pinning_gives_everything_back(monkeypatch):
    """The third layer's memory cannot be pinned: a refusal with numbers, and none left pinned."""
    from vllm_sparse.errors import ConfigError
    from vllm_sparse.offload import pool
    from vllm_sparse.offload.sizing import CacheShape

    pinned = []
    pin, unpin = pool.pin, pool.unpin

    def failing_pin(address, size):
        if len(pinned) == 5:
            raise RuntimeError("cudaHostRegister of 0.00 GiB: out of memory")
        pin(address, size)
        pinned.append(address)

    def watched_unpin(address):
        unpin(address)
        pinned.remove(address)

    monkeypatch.setattr(pool, "pin", failing_pin)
    monkeypatch.setattr(pool, "unpin", watched_unpin)
    monkeypatch.setattr(pool, "PIECE_BYTES", 1 << 20)
    shape = CacheShape(4, 2, 64, 16, 4, 1)
    with pytest.raises(ConfigError, match=r"sparse.offload.host_gib: .* could not be allocated and pinned"):
        pool.HostPool(shape, 128, torch.float32, torch.device("cuda"))
    assert not pinned
    monkeypatch.undo()
    again = pool.HostPool(shape, 128, torch.float32, torch.device("cuda"))
    again.layers[3].fill_(2.0)
    assert again.layers[3].is_cuda and again.layers[3].sum().item() == 2.0 * again.layers[3].numel()
    again.close()


def test_gather_reaches_the_link(capsys):
    """Not a benchmark: a fetch that crawls would mean pages are not mapped as meant."""
    from offload_cases import chosen_pages, make_store, tail_slots

    from vllm_sparse.kernels import launchers

    store = make_store(16384, 8, 128, 16, sets=256, staged=2, dtype=torch.bfloat16, seed=1)
    store.lookups.misses = torch.zeros(8 * 1024, dtype=torch.int32, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):  # the first one compiles
        before = store.lookups.counters[1].item()
        blocks = torch.randperm(16000)[:512].tolist()
        table = chosen_pages(store, [[*blocks, 16383]], 1024)
        launchers.plan_writes(tail_slots([16383], [4], 16), 16, store.plan)
        found = (store.plan, 1, store.hot_set, store.lookups)
        launchers.find_hot_slots(table, 8, 16, *found)
        start.record()
        launchers.fetch_head_pages(store.host, table, *found, store.hot)
        end.record()
        torch.cuda.synchronize()
    moved = store.lookups.counters[1].item() - before
    assert moved > 3000
    rate = moved * 8192 / (start.elapsed_time(end) / 1e3) / 1e9
    with capsys.disabled():
        print(f"\nfetch_head_pages: {moved} head pages of 8 KiB at {rate:.1f} GB/s")
    assert rate > 5, "far below any link to host memory"

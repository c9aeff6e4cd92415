"""Offload kernels against their torch references: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, TOLERANCE, error
from offload_cases import assert_consistent, chosen_pages, copy_of, make_store, tail_slots

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.e4m3 import kept, to_e4m3
from vllm_sparse.pages.geometry import Geometry

pytest.importorskip("triton")

from vllm_sparse.kernels import launchers, plan_writes
from vllm_sparse.pages.hot_set import HotSet

# (kv_heads, head_dim, page_size)
SHAPES = [(2, 32, 16), (1, 128, 16), (3, 96, 32), (2, 64, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_d{}_page{}".format(*shape))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
pools = pytest.mark.parametrize("fp8", [False, True], ids=["as_cache", "fp8"])


def slots_of(parts: list, page_size: int) -> torch.Tensor:
    """Slot mapping of [(blocks, first position, tokens)]; blocks None: padding."""
    slots = []
    for blocks, first, tokens in parts:
        positions = torch.arange(first, first + tokens)
        if blocks is None:
            slots.append(torch.full((tokens,), -1))
        else:
            slots.append(torch.tensor(blocks)[positions // page_size] * page_size + positions % page_size)
    return torch.cat(slots).to(torch.int64).to(DEVICE)


def mixed_step(page_size: int) -> torch.Tensor:
    """Decode rows, padding, a chunk from the middle of a page to that of another, one of whole pages."""
    return slots_of(
        [([5], 3, 1), ([9], page_size - 1, 1), (None, 0, 2), ([7, 2, 11], page_size // 2, 2 * page_size),
         ([4, 8], 0, 2 * page_size), (None, 0, 3), ([3], 0, 1)],
        page_size,
    )  # fmt: skip


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("page_size", [16, 64])
def test_writes_are_planned_as_by_the_reference(page_size, block, monkeypatch):
    """In one part, and in parts whose borders lie inside pages."""
    monkeypatch.setitem(plan_writes.TUNING, "block", block)
    actual = make_store(16, page_size=page_size, max_tokens=400)
    actual.plan.num_misses.fill_(9)
    actual.plan.staged_slots.fill_(-9)
    expected = copy_of(actual)
    for slots in (mixed_step(page_size), slots_of([(None, 0, 4)], page_size), mixed_step(page_size)):
        launchers.plan_writes(slots, page_size, actual.plan)
        reference.plan_writes(slots, page_size, expected.plan)
        for name, value in vars(actual.plan).items():
            assert torch.equal(value, getattr(expected.plan, name)), name
    assert actual.plan.clock.item() == 3 and actual.plan.num_pages.item() == 8


@shapes
@dtypes
@pools
@pytest.mark.parametrize("summary_slots, room", [(1, 0), (2, 0), (1, 2)])
def test_pages_are_staged_written_and_written_through_as_by_the_reference(shape, dtype, summary_slots, room, fp8):
    kv_heads, head_dim, page_size = shape
    actual = make_store(
        16, kv_heads, head_dim, page_size, dtype=dtype, max_tokens=400, summary_slots=summary_slots, fp8=fp8,
        room=room,
    )  # fmt: skip
    # Some of the blocks had owners whose head pages are in slots.
    head_pages = torch.arange(0, 16 * kv_heads, 3, device=DEVICE)
    hot_set = actual.hot_set
    hot_set.slot_of[head_pages] = torch.arange(len(head_pages), dtype=torch.int32, device=DEVICE)
    hot_set.slot_head_page[: len(head_pages)] = head_pages.int()
    hot_set.last_use[: len(head_pages)] = 1
    expected = copy_of(actual)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        slots = mixed_step(page_size)
        key, value = torch.randn(2, len(slots), kv_heads, head_dim, generator=generator).to(dtype).to(DEVICE)
        for run, store in ((launchers, actual), (reference, expected)):
            run.plan_writes(slots, page_size, store.plan)
            run.stage_pages(store.host, store.summaries, store.plan, len(slots), store.hot, store.exponents)
            staged = store.plan.staged_slots[: len(slots)]
            reference.page_write(key, value, store.hot, staged, page_size, "key_range")
            run.write_through(
                store.hot, store.plan, len(slots), store.host, store.summaries, store.hot_set, store.exponents
            )
    assert not fp8 or torch.equal(actual.exponents, expected.exponents)
    for name in ("host", "hot", "summaries"):
        ours, theirs = (getattr(store, name).contiguous().view(torch.int8) for store in (actual, expected))
        assert torch.equal(ours, theirs), name
    for name in ("slot_of", "slot_head_page", "last_use"):
        assert torch.equal(getattr(hot_set, name), getattr(expected.hot_set, name)), name
    written = {5, 9, 7, 2, 11, 4, 8, 3}
    for head_page in head_pages.tolist():
        assert (hot_set.slot_of[head_page].item() == -1) == (head_page // kv_heads in written)
    # The host now holds what was written, beside what was there.
    found = actual.on_host(4 * kv_heads + torch.arange(kv_heads, device=DEVICE)).transpose(0, 1)[:, :, :head_dim]
    written = key[len(key) - 4 - 2 * page_size :][:page_size]
    assert torch.equal(found, written) or (fp8 and error(found, written) < 2**-4)


def decode(run, store, table, tails: list[int]) -> None:
    slots = tail_slots(tails, [4] * len(tails), store.page_size)
    run.plan_writes(slots, store.page_size, store.plan)
    here = (store.plan, store.layer, store.hot_set, store.lookups)
    run.find_hot_slots(table, store.kv_heads, store.page_size, *here)
    run.fetch_head_pages(store.host, table, *here, store.hot, store.exponents)


@shapes
@dtypes
@pools
def test_find_and_fetch(shape, dtype, fp8):
    """Steps of three requests, one of them padding; contents, maps and counts after each."""
    kv_heads, head_dim, page_size = shape
    store = make_store(40, kv_heads, head_dim, page_size, sets=4, dtype=dtype, fp8=fp8)
    expected = copy_of(store)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        order = torch.randperm(38, generator=generator).tolist()
        rows = [[*sorted(order[:5]), 38], [], [*sorted(order[4:9]), 39]]
        tails = [38, -1, 39]
        table, theirs = chosen_pages(store, rows, 130), chosen_pages(store, rows, 130)
        wanted = table.head_pages.clone()
        decode(launchers, store, table, tails)
        decode(reference, expected, theirs, tails)
        assert_consistent(store)
        assert_consistent(expected)
        for row in range(3 * kv_heads):
            request, head = divmod(row, kv_heads)
            pages = len(rows[request])
            if not pages:
                assert torch.equal(table.head_pages[row], wanted[row])
                continue
            found = table.head_pages[row, : pages - 1]
            assert torch.equal(store.contents(found), store.on_host(wanted[row, : pages - 1]))
            staged = [0, None, 1][request]
            assert table.head_pages[row, pages - 1].item() == staged * kv_heads + head
            assert (table.head_pages[row, pages:] == 2**30).all()
            held = store.hot_set.last_use[(found[found >= 0] - store.hot_set.first_head_page).long()]
            assert (held == step + 1).all()
        assert (
            store.lookups.counters[0].item() == expected.lookups.counters[0].item() == (step + 1) * 10 * kv_heads
        )
    assert store.lookups.counters[1] + store.lookups.counters[2] < store.lookups.counters[0], (
        "nothing was ever found"
    )
    assert store.plan.num_misses[store.layer] < 10 * kv_heads
    assert (store.plan.num_misses[[0, 2]] == 0).all()


def test_shared_head_page_is_found_twice():
    store = make_store(12, sets=2)
    for _ in range(3):
        table = chosen_pages(store, [[1, 2, 3, 10], [2, 3, 4, 11]], 8)
        wanted = table.head_pages.clone()
        decode(launchers, store, table, [10, 11])
        assert_consistent(store)
        for row in range(4):
            assert torch.equal(
                store.contents(table.head_pages[row, :3]), store.host.flatten(0, 1)[wanted[row, :3].long()]
            )
    assert store.plan.num_misses[store.layer] == 0


@pytest.mark.parametrize("sets", [0, 1])
def test_without_a_slot_stays_on_the_host(sets):
    store = make_store(40, kv_heads=1, sets=sets, staged=4)
    table = chosen_pages(store, [[*range(30), 39]], 32)
    decode(launchers, store, table, [39])
    assert_consistent(store)
    away = table.head_pages[0, :30] < 0
    assert away.sum() == 30 - 16 * sets == store.lookups.counters[2]
    assert torch.equal(store.contents(table.head_pages[0, :30]), store.host.flatten(0, 1)[:30])
    # The next step does not need those that have slots, so the others take their places.
    other = [head_page for head_page in range(30) if away[head_page]][:8]
    table = chosen_pages(store, [[*other, 39]], 32)
    decode(launchers, store, table, [39])
    assert ((table.head_pages[0, :8] < 0).sum() == 0) == (sets > 0)
    assert_consistent(store)


def test_the_least_recently_used_slot_is_given_away():
    store = make_store(64, kv_heads=1, sets=1, staged=2)
    for pages in ([*range(16)], [*range(1, 16)], [20]):
        decode(launchers, store, chosen_pages(store, [[*pages, 63]], 20), [63])
    assert store.hot_set.slot_of[0] == -1 and store.hot_set.slot_of[20] >= 0
    assert (store.hot_set.slot_of[1:16] >= 0).all()


@dtypes
@pools
@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_pages_are_read_side_by_side(dtype, programs, fp8):
    source, exponents = torch.randn(9, 3, 17, 64, device=DEVICE).to(dtype), None
    if fp8:
        source, exponents = to_e4m3(source[:, :, :16])
    blocks = torch.tensor([8, 0, 3, 6, 3], dtype=torch.int32, device=DEVICE)
    places = torch.tensor([5, 1, 0, -1, 3], dtype=torch.int32, device=DEVICE)
    out = torch.full((6, 3, 16, 64), 7.0, dtype=dtype, device=DEVICE)
    expected = out.clone()
    launchers.read_pages(source, blocks, out, places, programs, exponents)
    reference.read_pages(source, blocks, expected, places, programs, exponents)
    assert torch.equal(out, expected) and (out[[2, 4]] == 7).all()
    assert torch.equal(out[5], kept(source, exponents, 8, dtype)[:, :16])


@dtypes
@pools
def test_decode_reads_gpu_and_host_alike(dtype, fp8):
    store = make_store(40, 2, 64, 16, dtype=dtype, fp8=fp8)
    store.hot.copy_(torch.randn(store.hot.shape).to(dtype))
    table = chosen_pages(store, [[*range(8)], [], [3, 4]], 12)
    table.head_pages[0, :4] = ~table.head_pages[0, :4]
    table.head_pages[2:4] = 2**30
    table.head_pages[4, 0] = ~table.head_pages[4, 0]
    q = torch.randn(3, 6, 64, device=DEVICE).to(dtype)
    # Keys on the host are up to 2**13 with codes: logits of thousands are off by more than any tolerance.
    geometry = Geometry.of(q, store.hot, 16, 2**-12 if fp8 else 0.125)
    out, expected = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    launchers.sparse_decode(q, store.hot, table, geometry, out, store.host, store.exponents)
    reference.sparse_decode(q, store.hot, table, geometry, expected, store.host, store.exponents)
    assert out[1].isnan().all()
    assert error(out[[0, 2]], expected[[0, 2]]) < TOLERANCE[dtype]
    # By hand: the first row of the first request.
    k, v = store.contents(table.head_pages[0, :8]).flatten(0, 1)[: 7 * 16 + 5].float().chunk(2, -1)
    by_hand = ((q[0, :3].float() @ k.T * geometry.scale).softmax(-1) @ v).to(dtype)
    assert error(expected[0, :3], by_hand) < TOLERANCE[dtype]


@pools
def test_offsets_past_int32(fp8):
    """Host pages in memory of more than 2**31 elements, of which only those that are read are ever touched."""
    kv_heads, page_size, content = 2, 16, 64
    blocks = 2**31 // (kv_heads * page_size * content) + 2
    host = torch.empty(blocks, kv_heads, page_size, content, dtype=torch.int8, device=DEVICE)
    last = torch.arange(kv_heads * page_size * content, device=DEVICE).to(torch.int8).view(host.shape[1:])
    host[blocks - 1] = last
    store = make_store(4, sets=1)
    store.host, store.hot = host, store.hot.to(torch.int8)
    if fp8:
        last, exponents = to_e4m3(torch.randn(last.shape, device=DEVICE))
        store.host, store.hot = host.view(torch.float8_e4m3fn), store.hot.float()
        store.exponents = torch.zeros(blocks, kv_heads, 2, dtype=torch.uint8, device=DEVICE)
        store.host[blocks - 1], store.exponents[blocks - 1] = last, exponents
        last = kept(last, exponents, slice(None), torch.float32)
    out = torch.zeros(1, *host.shape[1:], dtype=store.hot.dtype, device=DEVICE)
    page = torch.tensor([blocks - 1], dtype=torch.int32, device=DEVICE)
    launchers.read_pages(store.host, page, out, torch.zeros_like(page), 4, store.exponents)
    assert torch.equal(out[0], last)
    store.hot_set = HotSet.empty(blocks * kv_heads, 16, store.hot_set.first_head_page, DEVICE)
    table = chosen_pages(store, [[blocks - 1, 0]], 4)
    decode(launchers, store, table, [0])
    assert torch.equal(store.contents(table.head_pages[:, 0]), last)
    assert store.lookups.counters.tolist() == [kv_heads, kv_heads, 0]

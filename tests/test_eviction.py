"""The replays of ``benchmarks/eviction.py``, by hand and against the store that they stand for."""

from __future__ import annotations

import random

from offload_cases import chosen_pages, make_store, tail_slots
from vllm_sparse.kernels import reference

from benchmarks.eviction import replay_lru, replay_optimal, replay_sets


def random_trace(steps: int, units: int, needed: int, seed: int = 0) -> list[list[int]]:
    """Some units are needed often, as sinks and recent pages are."""
    chance = random.Random(seed)
    return [sorted({int(units * chance.random() ** 3) for _ in range(needed)}) for _ in range(steps)]


def test_by_hand():
    trace = [[1, 2], [3], [1], [2], [1]]
    assert replay_optimal(trace, 2) == 3  # 3 stays out
    assert replay_lru(trace, 2) == 0 + 0 + 0 + 0 + 1
    assert replay_lru(trace, 3) == replay_optimal(trace, 3) == 3


def test_optimal_is_the_ceiling_and_a_set_of_all_slots_is_lru():
    trace = random_trace(60, 120, 12)
    for slots in (16, 32, 64):
        assert replay_sets(trace, slots) <= replay_optimal(trace, slots)
        assert replay_lru(trace, slots) <= replay_optimal(trace, slots)
    assert replay_sets(trace, 16) > 0
    first_uses = len({unit for step in trace for unit in step})
    assert replay_lru(trace, 128) == sum(map(len, trace)) - first_uses


def test_sets_are_what_the_store_does():
    trace = random_trace(25, 60, 14)
    store = make_store(64, kv_heads=1, sets=2, staged=2)
    for step in trace:
        table = chosen_pages(store, [[*step, 63]], 24)
        reference.plan_writes(tail_slots([63], [4], 16), 16, store.plan)
        found = (store.plan, store.layer, store.residency, store.misses)
        reference.find_slots(table, 1, 16, *found, store.counters)
        reference.fetch_units(store.host, table, *found, store.hot, store.counters)
    looked_up, fetched, in_place = store.counters.tolist()
    assert looked_up == sum(map(len, trace))
    assert looked_up - fetched - in_place == replay_sets(trace, 32)

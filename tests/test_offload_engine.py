"""Offload in the real engine: the tokens of resident mode, whatever happens to blocks and slots."""

from __future__ import annotations

import pytest
import torch
from tiny_engine import (
    attention_layers,
    engine_core,
    kv_cache,
    prompts,
    tokens,
)
from vllm_sparse.kernels import reference

from vllm_sparse import metrics

pytestmark = pytest.mark.engine

MIXED = prompts()
OFFLOAD = {"host_gib": 0.05}
PAGE_BYTES = 3 * 2 * 16 * 2 * 32 * 4
"""Host memory of a page of 16 tokens in the tiny model: layers, KV heads, rows, K and V, head size, float32."""
LITTLE_GPU = {"kv_cache_memory_bytes": 2 << 20}


def offloaded(llm) -> list:
    return [layer.impl.offloaded for layer in attention_layers(llm).values()]


def assert_store(llm) -> None:
    """Slots hold what the host holds, maps and slots agree, and summaries are those of the pages."""
    for layer in attention_layers(llm).values():
        part = layer.impl.offloaded
        heads, page_size = part.host.shape[1:3]
        residency, hot = part.residency, part.hot[:, :, :page_size].flatten(0, 1)
        held = torch.nonzero(residency.slot_of >= 0).squeeze(1)
        slots = residency.slot_of[held].long()
        assert len(set(slots.tolist())) == len(slots), "two units in one slot"
        assert torch.equal(residency.slot_unit[slots].long(), held)
        assert torch.equal(hot[residency.first_unit + slots], part.host.flatten(0, 1)[held])
        # The summaries of complete pages, written anew from the host's keys.
        used = torch.unique(held // heads)
        if len(used) and layer.impl.policy.summary == "key_range":
            fresh = part.host.new_zeros(len(used), heads, page_size + 1, 2 * layer.impl.head_size)
            key, value = part.host[used].transpose(1, 2).flatten(0, 1).chunk(2, -1)
            reference.page_write(key, value, fresh, torch.arange(len(key)), page_size, "key_range")
            summaries = kv_cache(layer)[used, :, 0].view(torch.int8)
            assert torch.equal(summaries, fresh[:, :, page_size].view(torch.int8))


def assert_idle(llm) -> None:
    """Every block is free again."""
    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not engine_core(llm).scheduler.running


@pytest.fixture(scope="module")
def resident(tiny):
    """Tokens of resident mode, each computed once."""
    known = {}

    def answer(batch=MIXED, max_tokens=24, sparse=None, **settings):
        key = repr((batch, max_tokens, sparse, settings))
        if key not in known:
            with tiny.start(sparse=sparse, **settings) as llm:
                known[key] = tokens(llm, batch, max_tokens)
        return known[key]

    return answer


@pytest.mark.parametrize("policy", ["midbound", "quest", "streaming", "random"])
def test_tokens_are_those_of_resident_mode(tiny, resident, policy):
    sparse = {"decode_policy": policy}
    expected = resident(sparse=sparse)
    with tiny.start(sparse={**sparse, "offload": OFFLOAD}) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts = metrics.snapshot()
        assert_store(llm)
        assert_idle(llm)
    assert counts["sparse_layers"] == 3 and counts["attended_tokens"] < counts["context_tokens"]
    assert 0 < counts["units_fetched"] < counts["units_looked_up"]
    assert counts["units_in_place"] == 0


def test_budget_of_everything_gives_stock_tokens(tiny):
    expected = tiny.stock(MIXED)
    with tiny.start(sparse={"budget_tokens": 2048, "offload": OFFLOAD}) as llm:
        assert tokens(llm, MIXED) == expected


@pytest.mark.parametrize("hot", [0, 0.02, 0.9])
def test_size_of_the_hot_set_changes_traffic_only(tiny, resident, hot):
    sparse, expected = {"offload": {**OFFLOAD, "hot_fraction": hot}}, resident(block_size=16)
    with tiny.start(sparse=sparse, block_size=16) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts, slots = metrics.snapshot(), offloaded(llm)[0].store.slots_per_layer
        assert_store(llm)
    if hot == 0:
        assert slots == 0 and counts["units_in_place"] == counts["units_looked_up"] > 0
    else:
        assert slots > 0 and counts["units_fetched"] > 0

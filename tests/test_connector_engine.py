"""KV connectors in the real engine: whole blocks bring their summaries, and other engines' blocks stay out.

vLLM's own connectors that copy whole blocks need GPUs, or packages that a CPU has not: what they register of an
engine's cache is checked here, by copying a block the way that says.
"""

from __future__ import annotations

import ctypes
from copy import copy
from types import SimpleNamespace

import block_store
import pytest
import torch
from block_store import BlockStore
from tiny_engine import attention_layers, cached_tokens, engine_core, kv_cache, outputs, prompts, tokens

pytestmark = pytest.mark.engine

PROMPTS = prompts((40, 300, 700))
FULL_BLOCKS = 1 + 9 + 21
"""Of 32 tokens each, less the last token of a prompt, which is always computed."""
HYBRID = {
    "tie_word_embeddings": True, "embedding": 0.05, "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip


@pytest.fixture
def store(tiny):
    with block_store.registered() as store:
        yield store


def start(tiny, connector=block_store.CONFIG, **changes):
    changes.setdefault("enable_prefix_caching", False)
    return tiny.start(kv_transfer_config=dict(connector), **changes)


def regions(connector: str, vllm_config, monkeypatch) -> list[tuple[int, int, int]]:
    """Address of the first block, bytes and stride of what a connector of vLLM's would copy of each block."""
    from vllm.config import KVTransferConfig

    config = copy(vllm_config)
    config.kv_transfer_config = KVTransferConfig(kv_connector=connector, kv_role="kv_consumer")
    return REGIONS[connector](config, BlockStore.kv_cache_config, BlockStore.caches, monkeypatch)


def offloading(config, kv_cache_config, caches, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

    given = []
    spec = SimpleNamespace(
        replicated_layout=False, get_worker=given.append, config=SimpleNamespace(canonical_layout=False)
    )
    OffloadingConnectorWorker(spec, config, kv_cache_config).register_kv_caches(caches)
    tensors = given[0].tensors
    return [
        (tensors[ref.tensor_idx].tensor.data_ptr(), ref.page_size_bytes, tensors[ref.tensor_idx].tensor.stride(0))
        for group in given[0].group_data_refs
        for ref in group
    ]


def simple_offload(config, kv_cache_config, caches, monkeypatch):
    from vllm.v1.simple_kv_offload.worker import SimpleCPUOffloadWorker

    worker = SimpleCPUOffloadWorker(config, kv_cache_config, 1 << 20)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(worker, "_init_cpu_mode", lambda *_: None)
    worker.register_kv_caches(caches)
    return [(cache.data_ptr(), cache.shape[1], cache.stride(0)) for cache in worker.gpu_kv_caches.values()]


class FakeStream:
    def __init__(self, **_):
        pass

    @staticmethod
    def priority_range():
        return 0, 0


class FakeNixl:
    """NIXL's agent, as far as registering goes."""

    def __init__(self, *_):
        pass

    def get_reg_descs(self, data, memory):
        return data

    get_xfer_descs = get_reg_descs

    def register_memory(self, *_, **__):
        pass

    deregister_memory = release_dlist_handle = remove_remote_agent = register_memory

    def prep_xfer_dlist(self, *_):
        return 1

    def get_agent_metadata(self):
        return b""


def nixl(config, kv_cache_config, caches, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, pull_worker, push_worker

    monkeypatch.setattr(base_worker, "NixlWrapper", FakeNixl)
    monkeypatch.setattr(base_worker, "nixl_agent_config", None)
    # It would move this process to cores of its own.
    monkeypatch.setattr(base_worker.current_platform, "discover_numa_topology", list, raising=False)
    push = config.kv_transfer_config.kv_connector == "NixlPushConnector"
    worker = push_worker.NixlPushConnectorWorker if push else pull_worker.NixlPullConnectorWorker
    worker = worker(config, config.kv_transfer_config.engine_id, kv_cache_config)
    worker.register_kv_caches(caches)
    addresses = worker.kv_caches_base_addr[worker.engine_id][worker.tp_rank]
    return list(zip(addresses, worker.block_len_per_layer, worker.block_stride_per_layer, strict=True))


def mooncake(config, kv_cache_config, caches, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector

    engine = SimpleNamespace(
        initialize=lambda *_: 0, get_rpc_port=lambda: 1, batch_register_memory=lambda *_: 0,
    )  # fmt: skip
    monkeypatch.setattr(mooncake_connector, "TransferEngine", lambda: engine)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(mooncake_connector.current_platform, "set_device", lambda *_: None, raising=False)
    worker = mooncake_connector.MooncakeConnectorWorker(config, "engine", kv_cache_config)
    worker.register_kv_caches(caches)
    return list(
        zip(worker.kv_caches_base_addr, worker.kv_block_len_per_layer, worker.block_len_per_layer, strict=True)
    )


def mooncake_store(config, kv_cache_config, caches, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.data import KeyMetadata, RankLocalStoreLayout

    layout = RankLocalStoreLayout(KeyMetadata("model", 0, 0, 0, 0), 32, 32)
    layout.register_kv_caches(list(caches.values()), kv_cache_config.num_blocks)
    (first, sizes), (second, _) = (layout.prepare_value_for_block(block) for block in (0, 1))
    return [(at, size, then - at) for at, size, then in zip(first, sizes, second, strict=True)]


REGIONS = {
    "OffloadingConnector": offloading,
    "SimpleCPUOffloadConnector": simple_offload,
    "NixlConnector": nixl,
    "NixlPushConnector": nixl,
    "MooncakeConnector": mooncake,
    "MooncakeStoreConnector": mooncake_store,
}


def assert_whole_blocks_are_copied(llm, connector, monkeypatch):
    """Copy a block by what ``connector`` registers; every number of it, summaries included, must arrive."""
    caches = BlockStore.caches
    for name, layer in attention_layers(llm).items():
        assert caches[name].data_ptr() == kv_cache(layer).data_ptr()
    num_blocks = BlockStore.kv_cache_config.num_blocks
    source, target = 1, num_blocks - 1
    for cache in caches.values():
        cache[source] = torch.rand(cache[source].shape)
        cache[target] = 0
    before = {name: cache[target - 1].clone() for name, cache in caches.items()}
    with monkeypatch.context() as patched:
        copied = regions(connector, engine_core(llm).vllm_config, patched)
    for address, size, stride in copied:
        ctypes.memmove(address + target * stride, address + source * stride, size)
    for name, cache in caches.items():
        assert torch.equal(cache[target], cache[source]), f"{connector} leaves out parts of blocks of {name}"
        assert torch.equal(cache[target - 1], before[name]), f"{connector} writes into other blocks"


def test_whole_blocks_bring_their_summaries(tiny, store, monkeypatch):
    with start(tiny, sparse={"decode_policy": "quest"}) as llm:
        computed = tokens(llm, PROMPTS)
        assert not store.loaded
    with start(tiny, sparse={"decode_policy": "quest"}) as llm:
        assert tokens(llm, PROMPTS) == computed
        assert len(store.loaded) == FULL_BLOCKS
        for layer in attention_layers(llm).values():
            cache = kv_cache(layer)
            assert cache[store.loaded, :, :32].abs().sum((1, 2, 3)).all(), "no K and V were loaded"
            assert cache[store.loaded, :, 32:].abs().sum((1, 2, 3)).all(), "no summaries were loaded"
        for connector in REGIONS:
            assert_whole_blocks_are_copied(llm, connector, monkeypatch)
    assert computed != tiny.stock(PROMPTS), "the budget changed nothing: this test would pass on a dense backend"
    # Sketches in the same bytes: nothing of what was stored is found.
    with start(tiny, sparse={"decode_policy": "sketch"}) as llm:
        tokens(llm, PROMPTS, 1)
        assert not store.loaded


def test_blocks_of_hybrid_models_are_copied_whole(tiny, store, monkeypatch):
    model = tiny.model("gemma3_text", **HYBRID)
    with start(tiny, model=model, sparse={"decode_policy": "quest"}) as llm:
        assert len(BlockStore.kv_cache_config.kv_cache_groups) > 1
        assert len({cache.stride(0) for cache in BlockStore.caches.values()}) == 1
        for connector in REGIONS:
            assert_whole_blocks_are_copied(llm, connector, monkeypatch)


def example(path):
    extra = {"shared_storage_path": str(path)}
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def test_loading_by_slot_is_refused_at_start(tiny, tmp_path):
    with (
        pytest.raises(ValueError, match=r"kv_connector 'ExampleConnector' .* token slot"),
        start(tiny, example(tmp_path)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_pages_of_the_dense_policy_are_loaded_by_slot_as_stocks_are(tiny, tmp_path):
    settings = {"sparse": {"decode_policy": "dense"}, "max_num_batched_tokens": 2048}
    expected = tiny.stock(PROMPTS)
    with start(tiny, example(tmp_path), **settings) as llm:
        assert tokens(llm, PROMPTS) == expected
    stored = list(tmp_path.iterdir())
    assert len(stored) == len(PROMPTS)
    with start(tiny, example(tmp_path), **settings) as llm:
        results = outputs(llm, PROMPTS)
    assert [list(result.outputs[0].token_ids) for result in results] == expected
    assert cached_tokens(results) == [32, 288, 672], "nothing was loaded"

"""A KV connector that copies whole blocks, like vLLM's own for GPUs, and runs in-process on a CPU.

Blocks are stored by hash in this process, as a store shared by several engines would have them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

CONFIG = {"kv_connector": "BlockStore", "kv_role": "kv_both"}


class BlockStore(KVConnectorBase_V1, SupportsHMA):
    """Stores the blocks of requests that finish, and loads those of prompts, where layers form one group."""

    stored: ClassVar[dict] = {}
    """(block hash, layer) -> a block's numbers."""
    caches: ClassVar[dict[str, torch.Tensor]] = {}
    """Of the engine that started last."""
    kv_cache_config: ClassVar = None
    loaded: ClassVar[list[int]] = []
    """Blocks, of the engine that started last."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.block_size = vllm_config.cache_config.block_size
        self.layer = kv_cache_config.kv_cache_groups[0].layer_names[0]
        BlockStore.kv_cache_config = kv_cache_config
        BlockStore.loaded = []

    def register_kv_caches(self, kv_caches):
        BlockStore.caches = kv_caches

    def start_load_kv(self, forward_context, **kwargs):
        pass

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        first = num_computed_tokens // self.block_size
        hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        last = first
        while last < len(hashes) and (hashes[last], self.layer) in self.stored:
            last += 1
        self.range = range(first, last)
        return len(self.range) * self.block_size, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if not num_external_tokens:
            return
        for index in self.range:
            block = blocks.get_block_ids()[0][index]
            self.loaded.append(block)
            for name, cache in self.caches.items():
                cache[block] = self.stored[request.block_hashes[index], name]

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request, block_ids):
        if len(block_ids) == 1:
            full = (request.num_tokens - 1) // self.block_size
            for block_hash, block in zip(request.block_hashes[:full], block_ids[0], strict=False):
                for name, cache in self.caches.items():
                    self.stored[block_hash, name] = cache[block].clone()
        return False, None


@contextmanager
def registered(copies: str = "blocks"):
    """Let vLLM know the connector, and the sparse backend that it copies whole blocks."""
    from vllm_sparse.backend.connectors import CONNECTORS, Connector

    KVConnectorFactory.register_connector("BlockStore", __name__, "BlockStore")
    CONNECTORS["BlockStore"] = Connector(copies, "copies whole blocks in tests")
    try:
        yield BlockStore
    finally:
        del CONNECTORS["BlockStore"], KVConnectorFactory._registry["BlockStore"]
        BlockStore.stored.clear()
        BlockStore.caches = {}

"""KV connectors: which of them carry pages whole, and what keeps pages from engines that read them otherwise.

A page ends in its summary, so whatever copies whole blocks carries it, and whatever copies K and V by token slot
loses it: scores of such a page are garbage. :data:`CONNECTORS` says which does what; all others are refused.

What pages hold depends on settings, and bytes do not tell. Two marks that vLLM has of its own keep engines apart:

* Peers name each other's engines, so the engine id says what pages hold (:func:`page_format`), and a request that
  names a peer with other pages is refused where it arrives.
* Stores and tiers name blocks by hash, so the settings that shape K and V go into the hashes of an engine with a
  connector (:func:`cache_salt`), the way a request's own ``cache_salt`` does. Another engine's blocks are then
  never found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.support import OURS, QUANTISED_CACHES

logger = logging.getLogger("vllm.vllm_sparse")

FORMAT = 1
"""Version of what pages hold. Counts up with any change in what the bytes of a summary mean, or where they are."""
NOT_IN_PAGES = ("attention_kernel", "recall_monitor_every_steps", "recall_monitor_layers", "offload")
"""Settings on which neither K and V nor summaries depend."""
MARK = re.compile(r"-sparse\d+-[a-z0-9]+(?:_[a-z]+)?-\d+(?:-[a-z0-9]+)?")
"""What :func:`page_format` gives, anywhere in an engine id: vLLM appends the data-parallel rank."""

BLOCKS, SLOTS, NEITHER = "blocks", "slots", "neither"


@dataclass(frozen=True)
class Connector:
    """One of vLLM's connectors, as far as pages are concerned."""

    copies: str
    """``blocks``: whole pages, allowed. ``slots``: K and V alone, allowed where pages hold nothing else.
    ``neither``: refused."""
    reason: str
    apart: str = ""
    """What keeps other engines' pages out."""
    tests: tuple[str, ...] = ()
    """``file.py::test``, in the folder ``tests``: what shows an allowed one at work."""


_HASHED = "block hashes, which the settings go into"
_NAMED = "engine ids, which say what pages hold"
_COPIED = "test_connector_engine.py::test_whole_blocks_bring_their_summaries"
_OFFLOADED = "test_gpu_connectors.py::test_blocks_come_back_from_the_cpu"
_PULLED = "test_nixl_engine.py::test_a_decode_engine_goes_on_from_pages_of_a_prefill_engine"

CONNECTORS: dict[str, Connector] = {
    "OffloadingConnector": Connector(
        BLOCKS, "copies whole blocks to CPU memory, and from there to its tiers", _HASHED, (_COPIED, _OFFLOADED)
    ),
    "SimpleCPUOffloadConnector": Connector(
        BLOCKS, "copies whole blocks to CPU memory or disk", _HASHED, (_COPIED, _OFFLOADED)
    ),
    "NixlConnector": Connector(BLOCKS, "reads whole blocks of its peers", _NAMED, (_COPIED, _PULLED)),
    "NixlPullConnector": Connector(BLOCKS, "reads whole blocks of its peers", _NAMED, (_COPIED, _PULLED)),
    "NixlPushConnector": Connector(BLOCKS, "writes whole blocks to its peers", _NAMED, (_COPIED,)),
    "MooncakeConnector": Connector(BLOCKS, "writes whole blocks to its peers", _NAMED, (_COPIED,)),
    "MooncakeStoreConnector": Connector(BLOCKS, "stores whole blocks", _HASHED, (_COPIED,)),
    "LMCacheMPConnector": Connector(
        BLOCKS,
        "copies whole blocks to LMCache's server, for which a page's summary makes its tokens wider",
        "salts, which the settings go into",
        ("test_lmcache_engine.py::test_blocks_come_back_with_their_summaries",),
    ),
    "ExampleHiddenStatesConnector": Connector(
        BLOCKS,
        "loads nothing, and stores hidden states out of a layer of its own",
        "nothing comes in",
        ("test_connectors.py::test_connectors_that_copy_whole_blocks_are_allowed",),
    ),
    "ExampleConnector": Connector(
        SLOTS, "it loads K and V by token slot, and pages arrive without their summaries"
    ),
    "DecodeBenchConnector": Connector(
        SLOTS, "it fills pages with made-up K and V, and their summaries with the same"
    ),
    "LMCacheConnectorV1": Connector(
        NEITHER,
        "it names chunks by their tokens alone, and would take those of an engine with other summaries; LMCache's "
        "server, by LMCacheMPConnector, has salts",
    ),
    "FlexKVConnectorV1": Connector(NEITHER, "FlexKV lays out K and V by itself, without their summaries"),
    "HF3FSKVConnector": Connector(
        NEITHER, "it names blocks by their tokens alone, and would take those of an engine with other summaries"
    ),
    "HiSparseConnector": Connector(
        NEITHER, "it serves models with sparse MLA, whose layers never run on this backend"
    ),
    "MoRIIOConnector": Connector(NEITHER, "nobody has seen it carry summaries, on the AMD GPUs that it is for"),
}
"""Every connector of the vLLM releases we serve, but for MultiConnector, which is what is inside it."""

OFFLOADING_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
"""Values of ``spec_name`` of the OffloadingConnector that come with vLLM."""


OFFLOADING_BACKENDS = {"native": "OffloadingConnector", "lmcache": "LMCacheMPConnector"}
"""Values of ``--kv-offloading-backend``, and the connector that each means."""


def check(vllm_config: Any, config: SparseConfig) -> None:
    """Refuse connectors that lose summaries, and mark the engine id with what pages hold.

    Raises:
        ConfigError: the engine's connector, or one inside it, does not go with ``config``.
    """
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    offloads = getattr(cache, "kv_offloading_size", None) is not None
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config
    if offloads:
        # vLLM makes a connector of this option only after it has asked us.
        _check_connector(OFFLOADING_BACKENDS[cache.kv_offloading_backend], None, extra, config)
    elif transfer.kv_connector is not None:
        _check_connector(transfer.kv_connector, transfer.kv_connector_module_path, extra, config)
    mark = page_format(config, cache.block_size, kv_of_pages(vllm_config))
    marked, found = MARK.subn(mark, transfer.engine_id)
    transfer.engine_id = marked if found else transfer.engine_id + mark
    if not found:
        logger.info("sparse attention: KV connector: pages are exchanged with engines whose id has %r", mark)


def _check_connector(name: str, module_path: str | None, extra: dict, config: SparseConfig) -> None:
    if name == "MultiConnector" and not module_path:
        for inner in extra.get("connectors", ()):
            inner_extra = inner.get("kv_connector_extra_config") or {}
            _check_connector(inner.get("kv_connector"), inner.get("kv_connector_module_path"), inner_extra, config)
        return
    known = CONNECTORS.get(name)
    if module_path:
        reason = f"it comes from {module_path!r}, and whether that copies whole blocks is not known"
    elif known is None:
        reason = "whether it copies whole blocks is not known"
    elif known.copies == BLOCKS or (known.copies == SLOTS and _is_stock(config)):
        _check_offloading_spec(name, extra)
        return
    else:
        reason = known.reason
    allowed = ", ".join(
        [*(name for name, known in CONNECTORS.items() if known.copies == BLOCKS), "MultiConnector of these"]
    )
    slots = ", ".join(name for name, known in CONNECTORS.items() if known.copies == SLOTS)
    raise ConfigError(
        f"--kv-transfer-config: kv_connector {name!r} is not supported by the sparse backend: {reason}; "
        f"allowed: {allowed}; with sparse.decode_policy and sparse.prefill_policy 'dense' also {slots}"
    )


def _is_stock(config: SparseConfig) -> bool:
    """Whether pages hold K and V alone, and those that stock vLLM computes."""
    return config.decode_policy == config.prefill_policy == "dense"


def _check_offloading_spec(name: str, extra: dict) -> None:
    spec = extra.get("spec_name", OFFLOADING_SPECS[0])
    if name == "OffloadingConnector" and spec not in OFFLOADING_SPECS:
        raise ConfigError(
            f"--kv-transfer-config: spec_name {spec!r} of the OffloadingConnector is not supported by the sparse "
            f"backend: whether it copies whole blocks is not known; allowed: {', '.join(OFFLOADING_SPECS)}"
        )


def kv_of_pages(vllm_config: Any) -> str:
    """How the layers of an engine store K and V, in letters and digits: the same text for the same bytes."""
    dtype, left_out = compat.kv_dtype(vllm_config), vllm_config.cache_config.kv_cache_dtype_skip_layers
    if dtype not in QUANTISED_CACHES:
        return dtype
    return f"fp8but{_digest(sorted(left_out))[:8]}" if left_out else "fp8"


def page_format(config: SparseConfig, page_size: int, kv: str) -> str:
    """The part of an engine id that says what pages hold: the same text for the same bytes.

    ``kv``: from :func:`kv_of_pages`.
    """
    summary = DECODE_POLICIES[config.decode_policy].summary
    return f"-sparse{FORMAT}-{summary}-{page_size}-{kv}"


def cache_salt(config: SparseConfig, kv: str) -> str:
    """A salt for block hashes that keeps pages apart from those of other settings, and of stock vLLM.

    ``kv``: from :func:`kv_of_pages`; vLLM's own hashes are of tokens alone.
    """
    settings = {name: value for name, value in config.to_mapping().items() if name not in NOT_IN_PAGES}
    return f"sparse{FORMAT}-{_digest({**settings, 'kv': kv})[:32]}"


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_peer(engine_id: str, params: dict | None) -> None:
    """Refuse a request whose pages are with an engine of another page format.

    Raises:
        VLLMValidationError: the peer stores something else beside K and V, or nothing, as stock vLLM does.
    """
    from vllm.exceptions import VLLMValidationError

    peer = (params or {}).get("remote_engine_id")
    if not peer:
        return
    own, others = ("".join(MARK.findall(str(name))) or "nothing" for name in (engine_id, peer))
    if own != others:
        raise VLLMValidationError(
            f"kv_transfer_params.remote_engine_id: {peer!r} has pages of another format: its id says {others}, "
            f"and that of this engine {own}; allowed: engines with the sparse backend, the same sparse settings, "
            f"--block-size and --kv-cache-dtype"
        )


VIEWED = ("LMCacheMPConnector",)
"""Connectors that compare the slots of a block with its tokens: they get :func:`as_whole_tokens` of our caches."""


def as_whole_tokens(cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """A cache as tokens that are wider by their share of a summary, for who copies whole blocks.

    A block's slots of one KV head lie together, so the same bytes are also ``block_size`` slots of equal width.

    Args:
        cache: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim], where a block is one page.

    Raises:
        ConfigError: a block does not divide into as many tokens.
    """
    blocks, heads, slots, width = cache.shape
    if slots == block_size:
        return cache
    wide, left = divmod(slots * width, block_size)
    if left or cache.stride()[2:] != (width, 1):
        raise ConfigError(
            f"--kv-transfer-config: {', '.join(VIEWED)}: {slots} slots of {width} numbers, of a page with its "
            f"summary, do not divide into {block_size} tokens; allowed: a smaller --block-size"
        )
    return cache.as_strided((blocks, heads, block_size, wide), (*cache.stride()[:2], wide, 1))


def install_views() -> None:
    """Give connectors of :data:`VIEWED` our caches in the shape that they take, inside others, too; re-entrant."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in VIEWED:
        load = KVConnectorFactory._registry[name]
        if not hasattr(load, "_vllm_sparse"):
            viewing = functools.partial(_loaded, load)
            viewing._vllm_sparse = True
            KVConnectorFactory._registry[name] = viewing


def _loaded(load: Callable[[], type]) -> type:
    return _viewing(load())


@functools.cache
def _viewing(connector: type) -> type:
    """``connector`` that registers views of the caches of sparse layers."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        block_size = self._vllm_config.cache_config.block_size
        viewed = dict(kv_caches)
        for name, cache in kv_caches.items():
            decision = getattr(layers.get(name), "sparse_support", None)
            if decision is not None and decision.treatment in OURS:
                viewed[name] = as_whole_tokens(cache, block_size)
        connector.register_kv_caches(self, viewed)

    return type(connector.__name__, (connector,), {"register_kv_caches": register_kv_caches})


def install_request_hook() -> None:
    """Let engines with a connector mark the block hashes of requests, and check the peers that requests name."""
    from vllm.v1.engine.core import EngineCore

    original = EngineCore.preprocess_add_request
    if hasattr(original, "_vllm_sparse"):
        return

    @functools.wraps(original)
    def preprocess_add_request(self, request):
        transfer = self.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector is None or not compat.asks_for_sparse(self.vllm_config):
            return original(self, request)
        if not hasattr(self, "sparse_cache_salt"):
            config = SparseConfig.from_vllm(self.vllm_config)
            self.sparse_cache_salt = cache_salt(config, kv_of_pages(self.vllm_config))
        request.cache_salt = f"{self.sparse_cache_salt}-{request.cache_salt or ''}"
        added, wave = original(self, request)
        check_peer(transfer.engine_id, added.kv_transfer_params)
        return added, wave

    preprocess_add_request._vllm_sparse = True
    EngineCore.preprocess_add_request = preprocess_add_request

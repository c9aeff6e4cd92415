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
from dataclasses import dataclass
from typing import Any

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.support import QUANTISED_CACHES

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


_HASHED = "block hashes, which the settings go into"
_NAMED = "engine ids, which say what pages hold"

CONNECTORS: dict[str, Connector] = {
    "OffloadingConnector": Connector(
        BLOCKS, "copies whole blocks to CPU memory, and from there to its tiers", _HASHED
    ),
    "SimpleCPUOffloadConnector": Connector(BLOCKS, "copies whole blocks to CPU memory or disk", _HASHED),
    "NixlConnector": Connector(BLOCKS, "reads whole blocks of its peers", _NAMED),
    "NixlPullConnector": Connector(BLOCKS, "reads whole blocks of its peers", _NAMED),
    "NixlPushConnector": Connector(BLOCKS, "writes whole blocks to its peers", _NAMED),
    "MooncakeConnector": Connector(BLOCKS, "writes whole blocks to its peers", _NAMED),
    "MooncakeStoreConnector": Connector(BLOCKS, "stores whole blocks", _HASHED),
    "ExampleHiddenStatesConnector": Connector(
        BLOCKS, "loads nothing, and stores hidden states out of a layer of its own", "nothing comes in"
    ),
    "ExampleConnector": Connector(
        SLOTS, "it loads K and V by token slot, and pages arrive without their summaries"
    ),
    "DecodeBenchConnector": Connector(
        SLOTS, "it fills pages with made-up K and V, and their summaries with the same"
    ),
    "LMCacheConnectorV1": Connector(NEITHER, "LMCache copies K and V by token slot, and lays them out by itself"),
    "LMCacheMPConnector": Connector(
        NEITHER, "LMCache's server lays out K and V by itself, without their summaries"
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


def check(vllm_config: Any, config: SparseConfig) -> None:
    """Refuse connectors that lose summaries, and mark the engine id with what pages hold.

    Raises:
        ConfigError: the engine's connector, or one inside it, does not go with ``config``.
    """
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    offloads = getattr(cache, "kv_offloading_size", None) is not None
    if offloads and cache.kv_offloading_backend != "native":
        # vLLM makes a connector of these options only after it has asked us.
        raise ConfigError(
            f"--kv-offloading-backend: {cache.kv_offloading_backend!r} is not supported by the sparse backend: "
            f"{CONNECTORS['LMCacheMPConnector'].reason}; allowed: native"
        )
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config
    if offloads:
        _check_connector("OffloadingConnector", None, extra, config)
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
        request.cache_salt = f"{self.sparse_cache_salt}/{request.cache_salt or ''}"
        added, wave = original(self, request)
        check_peer(transfer.engine_id, added.kv_transfer_params)
        return added, wave

    preprocess_add_request._vllm_sparse = True
    EngineCore.preprocess_add_request = preprocess_add_request

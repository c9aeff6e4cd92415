"""KV connectors: which are allowed, and what keeps pages apart that hold different summaries."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.core import EngineCore

from vllm_sparse.backend import compat, connectors
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.config import OffloadConfig
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.pages.summaries import summary_slots
from vllm_sparse.policies.registry import DECODE_POLICIES
from vllm_sparse.support import Decision, Treatment

QUEST = SparseConfig(decode_policy="quest")
STOCK = SparseConfig(decode_policy="dense")
BLOCKS, SLOTS, NEITHER = (
    [name for name, known in connectors.CONNECTORS.items() if known.copies == copies]
    for copies in (connectors.BLOCKS, connectors.SLOTS, connectors.NEITHER)
)
MINE = "my.package.connector"


def transfer(name, module_path=None, **extra):
    return KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_module_path=module_path, kv_connector_extra_config=extra
    )


def check(kv_transfer_config, config=QUEST, block_size=16, **cache):
    """The engine's config after the check."""
    cache = {"block_size": block_size, "kv_offloading_size": None, "kv_offloading_backend": "native", **cache}
    connectors.check(engine(kv_transfer_config, **cache), config)
    return kv_transfer_config


def engine(kv_transfer_config, scheme=None, **changes):
    """What is read of an engine's config."""
    checkpoint = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    checkpoint = SimpleNamespace(quantization_config=checkpoint)
    cache = {"cache_dtype": "auto", "kv_cache_dtype_skip_layers": [], **changes}
    return SimpleNamespace(
        cache_config=SimpleNamespace(**cache), kv_transfer_config=kv_transfer_config,
        model_config=SimpleNamespace(dtype="torch.bfloat16", hf_config=checkpoint),
    )  # fmt: skip


def multi(*inner):
    return transfer("MultiConnector", connectors=[inner_config(each) for each in inner])


def inner_config(config):
    return {
        "kv_connector": config.kv_connector,
        "kv_role": "kv_both",
        "kv_connector_module_path": config.kv_connector_module_path,
        "kv_connector_extra_config": config.kv_connector_extra_config,
    }


def test_every_connector_of_this_vllm_has_been_looked_at():
    assert set(KVConnectorFactory._registry) - {"BlockStore"} == {*connectors.CONNECTORS, "MultiConnector"}
    for known in connectors.CONNECTORS.values():
        assert known.reason and bool(known.apart) == (known.copies == connectors.BLOCKS)


@pytest.mark.parametrize("policy", DECODE_POLICIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_connectors_that_copy_whole_blocks_are_allowed(name, policy):
    check(transfer(name), SparseConfig(decode_policy=policy))
    check(multi(transfer(name), multi(transfer(name))), SparseConfig(decode_policy=policy))


REFUSED = {
    **{name: (transfer(name), name, connectors.CONNECTORS[name].reason) for name in (*SLOTS, *NEITHER)},
    "unknown": (transfer("UMBPConnector"), "UMBPConnector", "is not known"),
    "of a module": (transfer("MyConnector", MINE), "MyConnector", MINE),
    "a module's of a known name": (transfer("NixlConnector", MINE), "NixlConnector", MINE),
    "a module's MultiConnector": (transfer("MultiConnector", MINE), "MultiConnector", MINE),
    "inside": (multi(transfer("NixlConnector"), transfer("ExampleConnector")), "ExampleConnector", "token slot"),
    "a module's inside": (multi(transfer("NixlConnector", MINE)), "NixlConnector", MINE),
    "deep inside": (multi(multi(transfer("HF3FSKVConnector"))), "HF3FSKVConnector", "by their tokens alone"),
    "offloading by another's code": (
        transfer("OffloadingConnector", spec_name="MySpec", spec_module_path=MINE), "MySpec", "is not known",
    ),
    "offloading by another's code inside": (
        multi(transfer("OffloadingConnector", spec_name="MySpec")), "MySpec", "is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(case):
    config, name, reason = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        check(config)
    message = str(error.value)
    assert message.startswith("--kv-transfer-config: ") and repr(name) in message and reason in message
    assert "; allowed: " in message


@pytest.mark.parametrize("name", SLOTS)
def test_pages_of_dense_policies_have_nothing_to_lose(name):
    check(transfer(name), STOCK)
    check(multi(transfer("NixlConnector"), transfer(name)), STOCK)
    for sparse in ({"prefill_policy": "a_shape"}, {"decode_policy": "streaming"}):
        with pytest.raises(ConfigError, match=name):
            check(transfer(name), replace(STOCK, **sparse))
    for other in (*NEITHER, "UMBPConnector"):
        with pytest.raises(ConfigError, match=other):
            check(transfer(other), STOCK)


def test_offloading_options_of_vllm_are_connectors_too():
    assert check(None, kv_offloading_size=4.0) is None
    check(KVTransferConfig(), kv_offloading_size=4.0)
    for backend in connectors.OFFLOADING_BACKENDS:
        check(KVTransferConfig(), kv_offloading_size=4.0, kv_offloading_backend=backend)
    spec = KVTransferConfig(kv_connector_extra_config={"spec_name": "MySpec"})
    with pytest.raises(ConfigError, match="MySpec"):
        check(spec, kv_offloading_size=4.0)


def test_offload_refuses_every_connector():
    from vllm_sparse.support import check_options

    config = SparseConfig(offload=OffloadConfig(host_gib=1.0))
    for option, value in (("--kv-transfer-config", "NixlConnector"), ("--kv-offloading-size", None)):
        vllm_config = SimpleNamespace(
            speculative_config=None, model_config=None, parallel_config=None,
            kv_transfer_config=value and transfer(value),
            cache_config=SimpleNamespace(kv_offloading_size=None if value else 4.0),
        )  # fmt: skip
        with pytest.raises(ConfigError, match=f"{option}: not supported with sparse.offload"):
            check_options(vllm_config, config)


# Peers.


def test_engine_ids_say_what_pages_hold():
    ids = {
        policy: check(transfer("NixlConnector"), SparseConfig(decode_policy=policy)).engine_id
        for policy in DECODE_POLICIES
    }
    marks = {policy: "".join(connectors.MARK.findall(engine_id)) for policy, engine_id in ids.items()}
    assert all(marks[policy] and ids[policy].endswith(marks[policy]) for policy in marks)
    assert len(set(ids.values())) == len(ids), "engines are no longer told apart"
    alike = {}
    for policy, mark in marks.items():
        alike.setdefault(mark, set()).add(policy)
    assert sorted(map(sorted, alike.values())) == [
        ["arkvale", "midbound", "quest"], ["dense", "oracle", "random", "streaming"],
        ["sketch"], ["sketch2", "twilight"],
    ]  # fmt: skip


def test_marks_of_pages_change_with_what_their_bytes_mean(monkeypatch):
    assert connectors.page_format(QUEST, 16, "bfloat16") != connectors.page_format(QUEST, 32, "bfloat16")
    assert connectors.page_format(QUEST, 16, "bfloat16") == connectors.page_format(
        replace(QUEST, budget_tokens=999), 16, "bfloat16"
    )
    before = connectors.page_format(QUEST, 16, "bfloat16"), connectors.cache_salt(QUEST, "bfloat16")
    monkeypatch.setattr(connectors, "FORMAT", 12)
    after = connectors.page_format(QUEST, 16, "bfloat16"), connectors.cache_salt(QUEST, "bfloat16")
    assert before[0] != after[0] and before[1] != after[1]
    assert connectors.MARK.fullmatch(after[0])


@pytest.mark.parametrize("policy", DECODE_POLICIES)
def test_an_engine_id_is_marked_once(policy):
    """vLLM checks its config several times, appends ranks to engine ids, and users may reuse their objects."""
    config = SparseConfig(decode_policy=policy)
    given = transfer("MooncakeConnector")
    own = given.engine_id
    once = check(given, config).engine_id
    assert once == own + connectors.page_format(config, 16, "bfloat16")
    assert check(given, config).engine_id == once
    given.engine_id += "_dp3"
    assert check(given, config).engine_id == once + "_dp3"
    assert check(given, QUEST).engine_id == own + connectors.page_format(QUEST, 16, "bfloat16") + "_dp3"


def test_requests_that_name_a_peer_of_another_format_are_refused():
    def named(policy, block_size=16, **cache):
        return check(transfer("NixlConnector"), SparseConfig(decode_policy=policy), block_size, **cache).engine_id

    quest = named("quest")
    for peer in (named("quest"), named("midbound"), named("quest") + "_dp1", None):
        connectors.check_peer(quest, {"remote_engine_id": peer, "do_remote_prefill": True})
    connectors.check_peer(quest, {})
    connectors.check_peer(quest, None)
    others = named("quest", cache_dtype="fp8"), named("quest", cache_dtype="float16")
    for peer in (named("sketch2"), named("sketch"), named("dense"), named("quest", 32), *others, "stock", 7):
        for own, other in ((quest, peer), (peer, quest)):
            with pytest.raises(
                VLLMValidationError, match=r"kv_transfer_params\.remote_engine_id: .*same sparse settings"
            ):
                connectors.check_peer(own, {"remote_engine_id": other})


def test_kv_of_pages_is_what_layers_will_store():
    """What a checkpoint asks for, and layers that are left out, are known before vLLM has built a layer."""

    def of(**settings):
        return connectors.kv_of_pages(engine(None, **settings))

    coded = {of(cache_dtype="fp8"), of(cache_dtype="fp8_e4m3"), of(scheme={"strategy": "tensor"})}
    assert coded == {"fp8"} and of() == of(cache_dtype="bfloat16", scheme={"strategy": "tensor"}) == "bfloat16"
    left_out = [
        of(cache_dtype="fp8", kv_cache_dtype_skip_layers=layers) for layers in (["0", "3"], ["3", "0"], ["0"])
    ]
    assert left_out[0] == left_out[1] != left_out[2] and not set(left_out) & coded
    assert of(kv_cache_dtype_skip_layers=["0"]) == "bfloat16"
    for kv in ("fp8", "bfloat16", *left_out):
        assert connectors.MARK.fullmatch(connectors.page_format(QUEST, 16, kv))


# Shapes.


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("policy", DECODE_POLICIES)
def test_a_page_with_its_summary_is_as_many_wider_tokens(policy, page_size):
    """The same bytes: what is copied of a block by either shape is what it holds by the other."""
    slots = page_size + summary_slots(DECODE_POLICIES[policy].summary, page_size, 128, 2)
    padded = torch.rand(5, 2 * slots * 256 + 64)  # as vLLM pads blocks beside larger ones
    cache = padded.as_strided((5, 2, slots, 256), (padded.stride(0), slots * 256, 256, 1))
    viewed = connectors.as_whole_tokens(cache, page_size)
    assert viewed.shape[:3] == (5, 2, page_size) and viewed.data_ptr() == cache.data_ptr()
    assert viewed[3].numel() == cache[3].numel()
    expected = cache.clone()
    expected[3] = cache[1]
    viewed[3] = viewed[1].clone()
    assert torch.equal(cache, expected), "other bytes than those of the block were copied"


def test_pages_that_divide_into_no_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"LMCacheMPConnector: 65 slots of 96 numbers.*smaller --block-size"):
        connectors.as_whole_tokens(torch.zeros(3, 2, 65, 96), 64)


def test_connectors_that_compare_slots_get_views_of_our_layers_alone(monkeypatch):
    registered = []

    class Server:
        def __init__(self, layers):
            forward = SimpleNamespace(static_forward_context=layers)
            cache = SimpleNamespace(block_size=16)
            self._vllm_config = SimpleNamespace(compilation_config=forward, cache_config=cache)

        def register_kv_caches(self, kv_caches):
            registered.append({name: tuple(cache.shape) for name, cache in kv_caches.items()})

    (name,) = connectors.VIEWED
    monkeypatch.setitem(KVConnectorFactory._registry, name, lambda: Server)
    connectors.install_views()
    connectors.install_views()
    made = KVConnectorFactory.get_connector_class(transfer(name))
    assert KVConnectorFactory.get_connector_class_by_name(name) is made and issubclass(made, Server)
    sparse, stock = (SimpleNamespace(sparse_support=Decision(of)) for of in (Treatment.SPARSE, Treatment.STOCK))
    layers = {"sparse": sparse, "stock": stock, "unasked": SimpleNamespace()}
    made(layers).register_kv_caches({name: torch.zeros(3, 2, 17, 256) for name in layers})
    assert registered == [{"sparse": (3, 2, 16, 272), "stock": (3, 2, 17, 256), "unasked": (3, 2, 17, 256)}]


# Stores.


def test_block_hashes_are_those_of_an_engines_settings():
    salts = {connectors.cache_salt(SparseConfig(decode_policy=policy), "bfloat16") for policy in DECODE_POLICIES}
    assert len(salts) == len(DECODE_POLICIES)
    salt = connectors.cache_salt(QUEST, "bfloat16")
    for changes in ({"budget_tokens": 1024}, {"prefill_policy": "a_shape"}, {"min_context_tokens": 0}):
        assert connectors.cache_salt(replace(QUEST, **changes), "bfloat16") != salt
    for changes in ({"attention_kernel": "torch"}, {"recall_monitor_every_steps": 8}):
        assert connectors.cache_salt(replace(QUEST, **changes), "bfloat16") == salt


def added(monkeypatch, kv_transfer_config, backend="SPARSE", sparse=None, salt=None, cache_dtype="auto", **params):
    """A request as an engine adds it."""
    monkeypatch.setattr(compat, "asks_for_sparse", lambda vllm_config: backend == "SPARSE")
    vllm_config = engine(kv_transfer_config, cache_dtype=cache_dtype)
    vllm_config.additional_config = {"sparse": sparse or {"decode_policy": "quest"}}
    core = SimpleNamespace(
        vllm_config=vllm_config, mm_receiver_cache=None, request_block_hasher=hasher(),
    )  # fmt: skip
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    request = EngineCoreRequest(
        request_id="0", prompt_token_ids=list(range(40)), mm_features=None, arrival_time=0.0, lora_request=None,
        sampling_params=SamplingParams(extra_args={"kv_transfer_params": params} if params else None),
        pooling_params=None, cache_salt=salt, data_parallel_rank=None,
    )  # fmt: skip
    connectors.install_request_hook()
    return EngineCore.preprocess_add_request(core, request)[0]


def hasher():
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(16, sha256)


def test_engines_with_a_connector_hash_blocks_by_their_settings(monkeypatch):
    def hashes(*args, **kwargs):
        request = added(monkeypatch, *args, **kwargs)
        assert len(request.block_hashes) == 2
        return tuple(request.block_hashes)

    stored = transfer("OffloadingConnector")
    quest = hashes(stored)
    assert quest == hashes(stored)
    assert quest == hashes(multi(stored)), "the same settings in another connector"
    stock = hashes(stored, "FLASH_ATTN")
    different = [
        stock, quest, hashes(stored, salt="tenant"), hashes(stored, sparse={"decode_policy": "sketch"}),
        hashes(stored, sparse={"decode_policy": "quest", "budget_tokens": 1024}),
        hashes(stored, sparse={"decode_policy": "dense"}), hashes(stored, cache_dtype="fp8"),
    ]  # fmt: skip
    assert len({one for pair in different for one in pair}) == 2 * len(different)
    # Without a connector blocks never leave the engine, and hashes are those of stock, which routers count on.
    assert hashes(None) == hashes(KVTransferConfig()) == hashes(None, "FLASH_ATTN") == stock


def test_a_request_for_pages_of_stock_vllm_is_refused_where_it_arrives(monkeypatch):
    own = check(transfer("MooncakeConnector"))
    added(monkeypatch, own, remote_engine_id=check(transfer("MooncakeConnector")).engine_id)
    with pytest.raises(VLLMValidationError, match="its id says nothing"):
        added(monkeypatch, own, remote_engine_id="ca5e")
    added(monkeypatch, own, "FLASH_ATTN", remote_engine_id="ca5e")


def test_every_process_that_manages_our_blocks_has_the_hook():
    """Other processes send their specs there, and unpickling one loads the module that installs it."""
    from vllm_sparse.backend.spec import SparseAttentionSpec

    assert SparseAttentionSpec.__module__ == "vllm_sparse.backend.spec"
    assert EngineCore.preprocess_add_request._vllm_sparse
    hooked = EngineCore.preprocess_add_request
    connectors.install_request_hook()
    assert EngineCore.preprocess_add_request is hooked

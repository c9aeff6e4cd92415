"""Offload in the real engine: the tokens of resident mode, whatever happens to blocks and slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_models import model_of
from tiny_engine import (
    attention_layers,
    cached_tokens,
    engine_core,
    kv_cache,
    outputs,
    preemptions,
    prompts,
    tokens,
)  # fmt: skip

from vllm_sparse import metrics
from vllm_sparse.backend import prefill_rows
from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.e4m3 import kept

pytestmark = pytest.mark.engine

MIXED = prompts()
OFFLOAD = {"host_gib": 0.05}
PAGE_BYTES = 3 * 2 * 16 * 2 * 32 * 4
"""Host memory of a page of 16 tokens in the tiny model: layers, KV heads, rows, K and V, head size, float32."""
LITTLE_GPU = {"kv_cache_memory_bytes": 2 << 20}


def offloaded(llm) -> list:
    return [layer.impl.pages.offloaded for layer in attention_layers(llm).values()]


def assert_store(llm) -> None:
    """Slots hold what the host holds, maps and slots agree, and summaries are those of the pages."""
    for layer in attention_layers(llm).values():
        part = layer.impl.pages.offloaded
        heads, page_size = part.host.shape[1:3]
        hot_set, hot = part.hot_set, part.hot[:, :, :page_size].flatten(0, 1)
        held = torch.nonzero(hot_set.slot_of >= 0).squeeze(1)
        slots = hot_set.slot_of[held].long()
        assert len(set(slots.tolist())) == len(slots), "two head pages in one slot"
        assert torch.equal(hot_set.slot_head_page[slots].long(), held)
        by_head_page = None if part.exponents is None else part.exponents.flatten(0, 1)
        on_host = kept(part.host.flatten(0, 1), by_head_page, held, hot.dtype)
        assert torch.equal(hot[hot_set.first_head_page + slots], on_host)
        # The summaries of complete pages, written anew from the host's keys.
        used = torch.unique(held // heads)
        if len(used) and layer.impl.layout.summary == "key_range":
            fresh = hot.new_zeros(len(used), heads, page_size + 1, 2 * layer.impl.head_size)
            pages = kept(part.host, part.exponents, used, hot.dtype)
            key, value = pages.transpose(1, 2).flatten(0, 1).chunk(2, -1)
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


@pytest.mark.parametrize("policy", ["midbound", "streaming", "sketch2", "twilight"])
def test_tokens_are_those_of_resident_mode(tiny, resident, policy):
    sparse = {"decode_policy": policy}
    expected = resident(sparse=sparse)
    with tiny.start(sparse={**sparse, "offload": OFFLOAD}) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts = metrics.snapshot()
        assert_store(llm)
        assert_idle(llm)
    assert counts["sparse_layers"] == 3 and counts["attended_tokens"] < counts["context_tokens"]
    assert 0 < counts["head_pages_fetched"] < counts["head_pages_looked_up"]
    assert counts["head_pages_in_place"] == 0


@pytest.mark.seam
def test_budget_of_everything_gives_stock_tokens(tiny):
    expected = tiny.stock(MIXED)
    with tiny.start(sparse={"budget_tokens": 2048, "offload": OFFLOAD}) as llm:
        assert tokens(llm, MIXED) == expected


@pytest.mark.parametrize("hot", [0, 0.02])
def test_size_of_the_hot_set_changes_traffic_only(tiny, resident, hot):
    sparse, expected = {"offload": {**OFFLOAD, "hot_fraction": hot}}, resident(block_size=16)
    with tiny.start(sparse=sparse, block_size=16) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts, slots = metrics.snapshot(), offloaded(llm)[0].store.slots_per_layer
        assert_store(llm)
    if hot == 0:
        assert slots == 0 and counts["head_pages_in_place"] == counts["head_pages_looked_up"] > 0
    else:
        assert slots > 0 and counts["head_pages_fetched"] > 0


SPARSE_PREFILL = {"min_prefill_tokens": 128, "prefill_top_p": 0, "vertical_tokens": 32, "slash_tokens": 64}


@pytest.fixture
def chunk_reads(monkeypatch):
    """(pages read, pages that earlier steps filled) of each layer's chunks, read into a buffer of NaN."""
    from vllm_sparse.offload.contexts import ContextReader

    seen, read = [], ContextReader._read_old

    def watched(self, layer, run, buffer):
        buffer.fill_(float("nan"))
        read(self, layer, run, buffer)
        if run.chunk is not None:
            seen.append((len(run.old_blocks), run.chunk.first_position // buffer.shape[2]))

    monkeypatch.setattr(ContextReader, "_read_old", watched)
    return seen


@pytest.mark.parametrize(
    "policy, slash_tokens",
    [
        ("vertical_slash", 64),
        ("a_shape", 64),
        ("strided", 320),
        ("dilated", 64),
        ("longformer", 64),
        ("bigbird", 16),
    ],
)
def test_sparse_prefill_attends_to_the_same_pages(tiny, resident, chunk_reads, policy, slash_tokens):
    """Of a context it reads all if it looks at keys to choose, else only the pages that are attended to."""
    sparse = {**SPARSE_PREFILL, "prefill_policy": policy, "slash_tokens": slash_tokens}
    expected = resident(sparse=sparse, block_size=16)
    with tiny.start(sparse={**sparse, "offload": OFFLOAD}, block_size=16) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts = metrics.snapshot()
        assert_store(llm)
    assert 0 < counts["prefill_attended_pairs"] < counts["prefill_causal_pairs"]
    read, filled = (sum(column) for column in zip(*chunk_reads, strict=True))
    assert read == filled > 0 if policy == "vertical_slash" else 0 < read < 0.9 * filled


def test_empty_rows_beside_decodes_change_nothing(tiny, resident, monkeypatch):
    """Rows of no tokens before and after a step's prefill rows; their lengths and pages are of no one."""

    steps, runs_of = [], prefill_rows.context_runs

    def with_empty_rows(step, *args):
        common, num_decodes = step.common, step.num_decodes
        steps.append((num_decodes, common.num_reqs))
        for row in (common.num_reqs, num_decodes):
            table = common.block_table_tensor
            changes = {"block_table_tensor": torch.cat([table[:row], torch.ones_like(table[:1]), table[row:]])}
            for name in ("seq_lens", "seq_lens_cpu_upper_bound", "query_start_loc", "query_start_loc_cpu"):
                values = getattr(common, name)
                new = values[row : row + 1] if "start" in name else values.new_tensor([333])
                changes[name] = torch.cat([values[:row], new, values[row:]])
            common = common.replace(num_reqs=common.num_reqs + 1, **changes)
        return runs_of(replace(step, common=common), *args)

    sparse = {**SPARSE_PREFILL, "prefill_policy": "a_shape", "min_prefill_tokens": 400}
    expected = resident(sparse=sparse, block_size=16)
    with tiny.start(sparse={**sparse, "offload": OFFLOAD}, block_size=16) as llm:
        monkeypatch.setattr(prefill_rows, "context_runs", with_empty_rows)
        assert tokens(llm, MIXED, 24) == expected
        assert_store(llm)
    assert any(decodes and requests > decodes for decodes, requests in steps), "no step had both kinds of row"


@pytest.mark.seam
def test_many_contexts_in_a_step_are_attended_in_parts(tiny, resident):
    """Prompts of a step whose contexts, most of them from the prefix cache, do not fit one buffer together."""
    shared = prompts((700,) * 4, seed=2, shared=640)
    settings = {"max_model_len": 768, "max_num_batched_tokens": 1024, "block_size": 16}
    expected = resident(shared, **settings)
    seen = []
    with tiny.start(sparse={"offload": OFFLOAD}, **settings) as llm:
        reader = offloaded(llm)[0].store.contexts
        tokens(llm, shared[:1], 1)
        opened = type(reader).open

        def spy(self, layer, runs, index, *args):
            seen.append([len(run.block_table) for run in runs])
            return opened(self, layer, runs, index, *args)

        type(reader).open = spy
        try:
            results = outputs(llm, shared, 24)
        finally:
            type(reader).open = opened
        assert_store(llm)
    assert [list(result.outputs[0].token_ids) for result in results] == expected
    assert min(cached_tokens(results)) >= 640
    assert any(len(parts) > 1 for parts in seen), "all contexts fitted one buffer"


@pytest.mark.parametrize("batch", [prompts((700, 600, 500), seed=3), prompts((200, 210, 190), seed=4, shared=160)],
                         ids=["apart", "shared"])  # fmt: skip
def test_contexts_read_ahead_are_complete(tiny, resident, monkeypatch, batch):
    """As on a GPU, whose second stream may read as soon as it is asked to: before the layer's own writes.

    Of prompts that share a prefix in one step, the later ones hit blocks that this very step fills.
    """
    from contextlib import nullcontext

    from vllm_sparse.offload.contexts import ContextReader

    class Stream:
        def wait_stream(self, other):
            pass

    side, compute = Stream(), Stream()
    reads, on_side = [], []
    read = ContextReader._read_old

    def watched(self, layer, run, buffer):
        reads.append((bool(on_side), layer))
        buffer.fill_(float("nan"))  # whatever else it held is of another layer
        read(self, layer, run, buffer)

    def stream(chosen):
        assert chosen is side
        on_side.append(True)
        return nullcontext()

    sparse = {**SPARSE_PREFILL, "prefill_policy": "a_shape", "min_prefill_tokens": 400}
    expected = resident(batch, 8, sparse=sparse, block_size=16)
    with tiny.start(sparse={**sparse, "offload": OFFLOAD}, block_size=16) as llm:
        monkeypatch.setattr(ContextReader, "_read_old", watched)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: on_side.clear() or compute)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        offloaded(llm)[0].store.contexts.stream = side
        assert tokens(llm, batch, 8) == expected
    ahead = [layer for was_ahead, layer in reads if was_ahead]
    at_once = [layer for was_ahead, layer in reads if not was_ahead]
    assert set(ahead) >= {1, 2} and set(at_once) == {0}, "only a step's first read has nothing to hide behind"


@pytest.mark.seam
def test_prefix_cache_spans_the_host_pool(tiny, resident):
    """A prompt comes back after others have taken every hot slot, and is still cached."""
    first, others = prompts((700,), seed=7), prompts((700, 690, 680), seed=8)
    expected = resident(first, sparse=None)
    with tiny.start(sparse={"offload": OFFLOAD}, **LITTLE_GPU) as llm:
        assert tokens(llm, first, 24) == expected
        tokens(llm, others, 24)
        results = outputs(llm, first, 24)
        assert_store(llm)
        slots = offloaded(llm)[0].store.slots_per_layer
    assert [list(result.outputs[0].token_ids) for result in results] == expected
    assert cached_tokens(results) == [672]
    assert slots < 2 * 3 * 22, "the hot set held all prompts: nothing came from the host"


BATCH = prompts((100, 130, 90, 111), seed=5)
PREEMPTION = {"max_model_len": 256, "block_size": 16, "max_num_batched_tokens": 256}


@pytest.mark.seam
@pytest.mark.parametrize("caching", [True, False], ids=["prefix_cache", "no_prefix_cache"])
def test_requests_preempted_from_a_small_pool_give_stock_tokens(tiny, caching):
    expected = tiny.stock(BATCH, 90, max_model_len=256)
    offload = {"host_gib": 32.5 * PAGE_BYTES / 2**30}
    sparse = {"budget_tokens": 2048, "offload": offload}
    with preemptions() as seen, tiny.start(sparse=sparse, enable_prefix_caching=caching, **PREEMPTION) as llm:
        assert offloaded(llm)[0].host.shape[0] == 32
        assert tokens(llm, BATCH, 90) == expected
        assert_store(llm)
        assert_idle(llm)
    assert any(done for _, done in seen), "no request was preempted while it was decoding"


@pytest.mark.seam
def test_random_arrivals_and_aborts_leave_nothing_behind(tiny, resident):
    """Requests that share prefixes, in a pool that holds three of them, on a GPU that holds less."""
    import random

    from vllm import SamplingParams

    chance = random.Random(11)
    batch = prompts([chance.randint(20, 220) for _ in range(40)], seed=9, shared=64)
    expected = resident(batch, 12, enable_prefix_caching=False, **PREEMPTION)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    offload = {"host_gib": 40 * PAGE_BYTES / 2**30}
    got, aborted, waiting = {}, set(), list(range(len(batch)))
    with (
        preemptions() as seen,
        tiny.start(sparse={"offload": offload}, kv_cache_memory_bytes=1400 << 10, **PREEMPTION) as llm,
    ):
        engine = llm.llm_engine
        while waiting or engine.has_unfinished_requests():
            for _ in range(chance.randint(0, 3)):
                if waiting:
                    index = waiting.pop(0)
                    engine.add_request(str(index), {"prompt_token_ids": batch[index]}, params)
            for output in engine.step():
                if output.finished:
                    got[int(output.request_id)] = list(output.outputs[0].token_ids)
            running = [
                index for index in range(len(batch) - len(waiting)) if index not in got and index not in aborted
            ]
            if running and chance.random() < 0.1:
                victim = chance.choice(running)
                aborted.add(victim)
                engine.abort_request([str(victim)])
            if chance.random() < 0.1:
                assert_store(llm)
        assert_store(llm)
        assert_idle(llm)
        slots = offloaded(llm)[0].store.slots_per_layer
    assert 5 < len(aborted) < 30 and slots < 2 * 40
    preempted = {int(request) for request, done in seen if done}
    # After a preemption a request's own tokens are recomputed as prefill, densely.
    whole = [index for index in got if index not in aborted and index not in preempted]
    assert len(whole) > 15
    assert {index: got[index] for index in whole} == {index: expected[index] for index in whole}


def refused_start(tiny, **settings) -> str:
    with pytest.raises(Exception) as refusal, tiny.start(**settings):
        pass
    return str(refusal.value)


@pytest.mark.seam
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sparse": {"offload": {"host_gib": 1e6}}}, ["sparse.offload.host_gib: 1e+06", "GiB of RAM are free"]),
        ({"sparse": {"offload": {"host_gib": 0.0001}}}, ["--max-model-len 1024", "0.000 GiB of host memory"]),
        ({"sparse": {"offload": OFFLOAD}, "kv_cache_memory_bytes": 1 << 18}, ["--max-model-len", "of GPU memory"]),
        (
            {"sparse": {"offload": OFFLOAD}, "kv_transfer_config": {
                "kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["--kv-transfer-config", "sparse.offload"],
        ),
        (
            {"sparse": {"offload": OFFLOAD}, "num_gpu_blocks_override": 1 << 20},
            ["--num-gpu-blocks-override", "sparse.offload.host_gib"],
        ),
    ],
    ids=["more_than_free", "too_little_host", "too_little_gpu", "connector", "override"],
)  # fmt: skip
def test_what_offload_cannot_serve_is_refused(tiny, settings, said):
    message = refused_start(tiny, **settings)
    for words in said:
        assert words in message


@pytest.mark.seam
def test_memory_that_the_engine_took_is_not_looked_for_again(tiny, monkeypatch):
    """A server's engine process has its config checked once more when everything is allocated."""
    from vllm_sparse.backend import offload
    from vllm_sparse.errors import ConfigError
    from vllm_sparse.offload.limits import HostLimits

    with tiny.start(sparse={"offload": OFFLOAD}) as llm:
        config = llm.llm_engine.vllm_config
        monkeypatch.setattr(offload, "read_limits", lambda: HostLimits(0, 0, 0))
        before = dict(config.additional_config)
        config.__post_init__()
        assert config.additional_config == before
        config.additional_config["sparse"]["offload"]["host_gib"] *= 2
        with pytest.raises(ConfigError, match="do not fit"):
            config.__post_init__()


@pytest.mark.seam
@pytest.mark.parametrize(
    "case, said",
    [
        ("hybrid", "2 of 3 layers of this model do not run sparse"),
        ("sliding_window", "3 of 3 layers of this model do not run sparse"),
    ],
)
def test_models_with_layers_that_are_not_sparse_are_refused(tiny, case, said):
    message = refused_start(tiny, model=model_of(tiny, case), sparse={"offload": OFFLOAD})
    assert "sparse.offload" in message and said in message


@pytest.mark.seam
def test_capacity_is_what_the_host_pool_holds(tiny):
    with tiny.start(sparse={"offload": OFFLOAD}, block_size=16) as llm:
        blocks = engine_core(llm).vllm_config.cache_config.num_gpu_blocks
        store = offloaded(llm)[0].store
    assert blocks == int(OFFLOAD["host_gib"] * 2**30) // PAGE_BYTES == store.num_pages
    assert blocks * 16 * PAGE_BYTES / 16 > 0.99 * OFFLOAD["host_gib"] * 2**30
    with tiny.start(block_size=16) as llm:
        assert engine_core(llm).vllm_config.cache_config.num_gpu_blocks < blocks

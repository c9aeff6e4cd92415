"""Offload beside layers of states: K and V of full attention on the host, states in vLLM's blocks on the GPU."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from test_hybrids import EVERYTHING, FEW, MODELS, NUM_TOKENS, PROMPTS, TOO_OLD, model_of
from test_offload_engine import assert_idle, assert_store
from tiny_engine import (
    attention_layers,
    cached_tokens,
    engine_core,
    kv_cache,
    outputs,
    preemptions,
    prompts,
    tokens,
)

from vllm_sparse import metrics

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(TOO_OLD, reason="vLLM 0.31 has no kernels for these in float32 on a CPU"),
]

OFFLOAD = {"host_gib": 0.2}


def stores(llm) -> list:
    """The parts of the offload store of full-attention layers."""
    return [layer.impl.pages.offloaded for layer in attention_layers(llm).values()]


@pytest.fixture(scope="module")
def resident(tiny):
    """Tokens of resident mode, each computed once."""
    known = {}

    def answer(case, batch=PROMPTS, max_tokens=NUM_TOKENS, sparse=FEW, changes=(), **settings):
        key = repr((case, batch, max_tokens, sparse, changes, settings))
        if key not in known:
            model, options = model_of(tiny, case, **dict(changes))
            with tiny.start(model, sparse, **{**options, **settings}) as llm:
                known[key] = tokens(llm, batch, max_tokens)
        return known[key]

    return answer


@pytest.mark.seam
@pytest.mark.parametrize("case", ["granite4", "falcon_h1", "lfm2", "qwen3_next"])
def test_tokens_are_those_of_resident_mode(tiny, resident, case):
    model, options = model_of(tiny, case)
    expected = resident(case)
    with tiny.start(model, {**FEW, "offload": OFFLOAD}, **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        counts = metrics.snapshot()
        assert_store(llm)
        assert_idle(llm)
        blocks = engine_core(llm).vllm_config.cache_config.num_gpu_blocks
        host = [part.host for part in stores(llm)]
        pages = stores(llm)[0].store.shape.block_pages
    assert len(host) == MODELS[case][-1] and pages > 1
    assert all(len(layer) == blocks * pages for layer in host)
    assert counts["attended_tokens"] < 0.5 * counts["context_tokens"]
    assert 0 < counts["head_pages_fetched"] < counts["head_pages_looked_up"]


@pytest.mark.seam
def test_budget_of_everything_gives_stock_tokens(tiny):
    model, options = model_of(tiny, "granite4")
    expected = tiny.stock(PROMPTS, NUM_TOKENS, model=model, **options)
    with tiny.start(model, {**EVERYTHING, "offload": OFFLOAD}, **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected


@pytest.mark.parametrize(
    "sparse",
    [
        {"decode_policy": "midbound"}, {"decode_policy": "sketch2"}, {"decode_policy": "streaming"},
        {"prefill_policy": "vertical_slash", "min_prefill_tokens": 128, "prefill_top_p": 0, "vertical_tokens": 32,
         "slash_tokens": 64},
        {"prefill_policy": "a_shape", "min_prefill_tokens": 128, "slash_tokens": 64},
    ],
    ids=["midbound", "sketch2", "streaming", "vertical_slash", "a_shape"],
)  # fmt: skip
def test_policies(tiny, resident, sparse):
    model, options = model_of(tiny, "granite4")
    batch = PROMPTS[1:]  # no more than run at once: summaries become states as blocks change hands
    expected = resident("granite4", batch, sparse={**FEW, **sparse})
    with tiny.start(model, {**FEW, **sparse, "offload": OFFLOAD}, **options) as llm:
        assert tokens(llm, batch, NUM_TOKENS) == expected
        assert_store(llm)


@pytest.mark.parametrize("asked, blocks, slots", [(256, 256, 3), (160, 160, 4), (128, 640, 1), (992, 992, 1)])
def test_blocks_of_a_size_that_was_asked_for(tiny, resident, asked, blocks, slots):
    """Down to a quarter of what vLLM makes of them, in pages with room to spare, which no one reads."""
    model, options = model_of(tiny, "granite4")
    expected = resident("granite4", sparse={**FEW, "decode_policy": "sketch2"})
    sparse = {**FEW, "decode_policy": "sketch2", "offload": OFFLOAD}
    with tiny.start(model, sparse, **options, block_size=asked) as llm:
        shape = stores(llm)[0].store.shape
        (cache, *_) = (kv_cache(layer) for layer in attention_layers(llm).values())
        assert (shape.block_tokens, cache.shape[2]) == (blocks, slots)
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected


def test_codes_and_hot_sets_of_any_size(tiny, resident):
    model, options = model_of(tiny, "granite4")
    expected = resident("granite4", kv_cache_dtype="fp8")
    with tiny.start(model, {**FEW, "offload": OFFLOAD}, kv_cache_dtype="fp8", **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
    expected = resident("granite4")
    with tiny.start(model, {**FEW, "offload": {**OFFLOAD, "hot_fraction": 0}}, **options) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
    with tiny.start(model, {**FEW, "offload": {**OFFLOAD, "host_dtype": "fp8"}}, **options) as llm:
        found = tokens(llm, PROMPTS, NUM_TOKENS)
        assert_store(llm)
    assert found[0][0] == expected[0][0]


def pool_of(blocks: int, tiny, case: str, **settings) -> dict:
    """``offload`` with a host pool of so many blocks."""
    model, options = model_of(tiny, case)
    with tiny.start(model, {**FEW, "offload": OFFLOAD}, **{**options, **settings}) as llm:
        block_bytes = stores(llm)[0].store.shape.host_block_bytes
    return {"host_gib": (blocks + 0.5) * block_bytes / 2**30}


@pytest.mark.seam
@pytest.mark.parametrize("case, length, blocks, stock", [("granite4", 600, 10, None), ("lfm2", 190, 40, 40)])
def test_requests_preempted_from_a_small_pool(tiny, case, length, blocks, stock):
    """Blocks that were K and V on the host become states on the GPU, and the other way round.

    vLLM on a CPU changes tokens of a preempted convolution, so stock, whose blocks are as large, preempts, too.
    """
    model, options = model_of(tiny, case)
    batch = prompts((length,) * 4, seed=3)
    with tiny.start(model, backend="CPU_ATTN", num_gpu_blocks_override=stock, **options) as llm:
        expected = tokens(llm, batch, 100)
    offload = pool_of(blocks, tiny, case)
    with preemptions() as seen, tiny.start(model, {**EVERYTHING, "offload": offload}, **options) as llm:
        assert engine_core(llm).vllm_config.cache_config.num_gpu_blocks == blocks
        assert tokens(llm, batch, 100) == expected
        assert_store(llm)
        assert_idle(llm)
    assert any(done for _, done in seen), "no request was preempted while it was decoding"


@pytest.mark.seam
@pytest.mark.parametrize(
    "case, length, changes",
    # States of gated delta nets have as many bytes as K and V of heads of 64 in more than 2,000 tokens.
    [("granite4", 700, {}), ("qwen3_next", 1200, {"head_dim": 128}), ("lfm2", 300, {})],
    ids=["granite4", "qwen3_next", "lfm2"],
)
def test_prefix_cache_spans_the_host_pool(tiny, resident, case, length, changes):
    """A prompt comes back after others; K and V come from the host, and a state from the GPU."""
    model, options = model_of(tiny, case, **changes)
    options |= {"enable_prefix_caching": True, "max_model_len": 2048}
    first, others = prompts((length,), seed=7), prompts([length // 2 + more for more in (20, 10, 0)], seed=8)
    expected = resident(case, first, changes=tuple(changes.items()), max_model_len=2048)
    with tiny.start(model, {**FEW, "offload": OFFLOAD}, **options) as llm:
        block = engine_core(llm).vllm_config.cache_config.block_size
        assert tokens(llm, first, NUM_TOKENS) == expected
        tokens(llm, others, NUM_TOKENS)
        results = outputs(llm, first, NUM_TOKENS)
        assert_store(llm)
    assert [list(result.outputs[0].token_ids) for result in results] == expected
    assert cached_tokens(results) == [(length - 1) // block * block] and cached_tokens(results) > [0]


def serve_at_random(llm, batch) -> tuple[dict, set]:
    """Tokens of requests that arrive at random, and those that were aborted."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    chance, engine = random.Random(12), llm.llm_engine
    got, aborted, waiting = {}, set(), list(range(len(batch)))
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(chance.randint(0, 3), len(waiting))):
            index = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": batch[index]}, params)
        for output in engine.step():
            if output.finished:
                got[int(output.request_id)] = list(output.outputs[0].token_ids)
        running = sorted({*range(len(batch))} - {*waiting, *got, *aborted})
        if running and chance.random() < 0.1:
            victim = chance.choice(running)
            aborted.add(victim)
            engine.abort_request([str(victim)])
    return got, aborted


def test_prefixes_of_parts_of_blocks_are_refused(tiny):
    model, options = model_of(tiny, "granite4")
    options |= {"enable_prefix_caching": True, "prefix_match_unit": 64}
    with pytest.raises(Exception) as refusal, tiny.start(model, {"offload": OFFLOAD}, **options):
        pass
    assert "prefix caching in parts of blocks (64 of 640 tokens)" in str(refusal.value)


def test_random_arrivals_and_aborts_beside_a_prefix_cache(tiny):
    """Requests that share prefixes, in a pool of few blocks: pages and states, cached ones too, change places."""
    chance = random.Random(11)
    model, options = model_of(tiny, "lfm2")
    batch = prompts([chance.randint(20, 220) for _ in range(40)], seed=9, shared=64)
    options |= {"enable_prefix_caching": True, "max_model_len": 256}
    with preemptions() as seen, tiny.start(model, FEW, num_gpu_blocks_override=20, **options) as llm:
        expected, gone = serve_at_random(llm, batch)
    assert len(gone) > 3 and len(expected) > 20 and seen
    offload = pool_of(20, tiny, "lfm2", **options)
    with tiny.start(model, {**FEW, "offload": offload}, **options) as llm:
        assert serve_at_random(llm, batch) == (expected, gone)
        assert_store(llm)
        assert_idle(llm)

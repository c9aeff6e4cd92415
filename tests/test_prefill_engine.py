"""Sparse prefill inside the real engine, against stock vLLM on the same prompts."""

from __future__ import annotations

import pytest
from tiny_engine import attention_layers, cached_tokens, outputs, preemptions, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.config import SparseConfig
from vllm_sparse.policies import PREFILL_POLICIES
from vllm_sparse.prefill import attend as prefill
from vllm_sparse.prefill import gate

pytestmark = pytest.mark.engine

LAYERS, Q_HEADS = 3, 4
DENSE_DECODE = {"decode_policy": "dense", "min_prefill_tokens": 0}
EVERYTHING = {**DENSE_DECODE, "prefill_policy": "vertical_slash", "prefill_top_p": 1}
SIZES = {"prefill_top_p": 0, "vertical_tokens": 32, "slash_tokens": 32}
LITTLE = {**DENSE_DECODE, **SIZES, "prefill_policy": "vertical_slash"}
# Chunks that end anywhere in a page or block: what is left of 333 or 201 tokens after the decodes' share.
LENGTHS = (1, 5, 140, 300, 700, 517)
MIXED = prompts(LENGTHS, seed=9)
CHUNKS = [333, 201]


def pairs(lengths, first: int = 0) -> int:
    """Causal (query, key) pairs of prompts whose first tokens were cached, over all layers and heads."""
    return LAYERS * Q_HEADS * sum(n * (n + 1) // 2 - first * (first + 1) // 2 for n in lengths)


@pytest.fixture
def chunks(monkeypatch):
    """All chunks that run sparse; short ones too."""
    seen = []
    attend = prefill.SparsePrefill.attend

    def spy(self, q, kv, block_table, chunk, out):
        seen.append(chunk)
        attend(self, q, kv, block_table, chunk, out)

    monkeypatch.setattr(prefill, "MIN_CHUNK_TOKENS", 1)
    monkeypatch.setattr(gate, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(prefill.SparsePrefill, "attend", spy)
    # An estimate looks at 64 positions of context.
    monkeypatch.setitem(EVERYTHING, "min_prefill_tokens", 64)
    monkeypatch.setitem(LITTLE, "min_prefill_tokens", 64)
    return seen


@pytest.mark.seam
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("decode", ["dense", "quest"])
def test_top_p_of_everything(tiny, chunks, decode, chunk_tokens):
    """Odd chunks, several prefills in a step beside decodes, and prefix hits the second time."""
    settings = {"max_num_batched_tokens": chunk_tokens, "max_num_seqs": 6}
    sparse = {**EVERYTHING, "decode_policy": decode, "budget_tokens": 2048}
    with tiny.start(sparse=sparse, **settings) as llm:
        first, second = outputs(llm, MIXED), outputs(llm, MIXED)
        counts = metrics.snapshot()
    expected = tiny.stock(MIXED)
    assert [list(output.outputs[0].token_ids) for output in first] == expected
    assert [list(output.outputs[0].token_ids) for output in second] == expected
    assert cached_tokens(second) == [(length - 1) // 32 * 32 for length in LENGTHS]
    assert counts["sparse_layers"] == LAYERS
    assert counts["prefill_attended_pairs"] == counts["prefill_causal_pairs"] > 0
    assert any(chunk.first_position % 16 and chunk.num_tokens % 128 for chunk in chunks), "no odd chunk"
    assert any(chunk.request for chunk in chunks), "no sparse prefill beside another row"


@pytest.mark.seam
def test_several_prompts_at_once(tiny, chunks):
    """Prefill of several prompts at once attends what it counts."""
    batch = prompts((257, 300, 400), seed=4)
    expected = tiny.stock(batch)
    with tiny.start(sparse=EVERYTHING, max_num_batched_tokens=1024) as llm:
        assert tokens(llm, batch) == expected
        counts = metrics.snapshot()
    assert {chunk.request for chunk in chunks} == {0, 1, 2}
    assert counts["prefill_causal_pairs"] == pairs((257, 300, 400))


@pytest.mark.seam
def test_preempted_requests(tiny, chunks):
    batch = prompts((200, 130, 190, 211), seed=5)
    room = {"max_model_len": 320, "block_size": 16, "max_num_batched_tokens": 150}
    page_bytes = LAYERS * 2 * 16 * 2 * 32 * 4
    expected = tiny.stock(batch, 90, **room)
    settings = {**room, "kv_cache_memory_bytes": 40 * page_bytes}
    with preemptions() as seen, tiny.start(sparse=EVERYTHING, **settings) as llm:
        assert tokens(llm, batch, 90) == expected
    assert any(done for _, done in seen), "no request was preempted while it was decoding"
    assert chunks


@pytest.mark.seam
def test_few_pages_are_deterministic(tiny, chunks):
    """Else the tests of this file would pass on a backend that ignores the policy."""
    settings = {"enable_prefix_caching": False}
    with tiny.start(sparse=LITTLE, **settings) as llm:
        first, again = tokens(llm, MIXED), tokens(llm, MIXED)
        counts = metrics.snapshot()
    expected = tiny.stock(MIXED)
    assert first == again
    assert first[:2] == expected[:2], "a prompt of a few tokens was not dense"
    assert first[4] != expected[4]
    assert 0 < counts["prefill_attended_pairs"] < 0.8 * counts["prefill_causal_pairs"]


@pytest.mark.seam
def test_min_prefill_tokens(tiny, chunks):
    """Up to ``min_prefill_tokens`` a chunk is dense."""
    with tiny.start(sparse={**LITTLE, "min_prefill_tokens": 400}, max_num_batched_tokens=1024) as llm:
        got = tokens(llm, MIXED)
    expected = tiny.stock(MIXED)
    assert got[:4] == expected[:4] and got[4:] != expected[4:]
    assert {chunk.end_position for chunk in chunks} == {700, 517}


def test_short_chunks_are_dense(tiny, monkeypatch):
    """Such as drafts to verify, and the rest of a prompt after a prefix hit."""
    monkeypatch.setattr(prefill.SparsePrefill, "attend", None)
    expected = tiny.stock(MIXED)
    with tiny.start(sparse=LITTLE, max_num_batched_tokens=128) as llm:
        assert tokens(llm, MIXED) == expected


def test_auto_leaves_chunks_dense_that_cost_less_than_a_choice(tiny, monkeypatch):
    monkeypatch.setattr(prefill.SparsePrefill, "attend", None)
    expected = tiny.stock(MIXED)
    with tiny.start(sparse={**LITTLE, "prefill_policy": "auto"}) as llm:
        assert tokens(llm, MIXED) == expected


def test_auto_where_no_prompt_is_long_enough_takes_no_memory(tiny):
    """The default, which no other test of an engine names."""
    for sparse, policy in (({}, "dense"), ({"min_prefill_tokens": 64, "budget_tokens": 128}, "auto")):
        with tiny.start(sparse=sparse) as llm:
            assert SparseConfig.from_vllm(llm.llm_engine.vllm_config).prefill_policy == policy
            buffers = [layer.impl.workspace.prefill for layer in attention_layers(llm).values()]
        assert all((one is None) == (policy == "dense") for one in buffers) and len(buffers) == LAYERS


def test_auto_leaves_contexts_dense_that_the_budget_covers(tiny, monkeypatch):
    monkeypatch.setattr(gate, "LEAST_PRODUCTS", 0)
    sparse = {**SIZES, "min_prefill_tokens": 64, "min_context_tokens": 0}
    expected = tiny.stock(MIXED)
    for budget, same in ((4096, True), (128, False)):
        with tiny.start(sparse={**sparse, "budget_tokens": budget}, max_num_batched_tokens=1024) as llm:
            counts_before = metrics.snapshot().get("prefill_causal_pairs", 0)
            got = tokens(llm, MIXED)
            chose = metrics.snapshot().get("prefill_causal_pairs", 0) > counts_before
        assert chose != same and (got == expected or not same)


@pytest.mark.seam
def test_auto_looks_before_it_chooses_again(tiny, monkeypatch):
    """Chunks that keep nearly all are dense for a while; then a layer counts what they would keep, no more."""
    looked, attended = [], []
    attend, look = prefill.SparsePrefill.attend, prefill.SparsePrefill.look
    monkeypatch.setattr(gate, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(gate, "REST_STEPS", 2)
    monkeypatch.setattr(
        prefill.SparsePrefill, "attend", lambda self, *args: (attended.append(args[3]), attend(self, *args))
    )
    monkeypatch.setattr(
        prefill.SparsePrefill, "look", lambda self, *args: (looked.append(args[3]), look(self, *args))
    )
    sparse = {"prefill_policy": "auto", "min_prefill_tokens": 0, "budget_tokens": 128, "decode_policy": "dense"}
    ones = [prompts([700], seed=seed) for seed in range(5)]
    settings = {"max_num_batched_tokens": 1024, "enable_prefix_caching": False}
    expected = [tiny.stock(one) for one in ones]
    with tiny.start(sparse={**sparse, "prefill_top_p": 1}, **settings) as llm:
        first, *later = [tokens(llm, one) for one in ones]
        assert metrics.snapshot()["prefill_causal_pairs"] == pairs([700])
    assert len(attended) == LAYERS and first and later == expected[1:], "dense after the first one"
    assert [chunk.num_tokens for chunk in looked] == [700], "one layer of the fourth one, which sent it to rest"


@pytest.mark.seam
def test_dense_layers_prefill_densely(tiny, chunks):
    with tiny.start(sparse={**LITTLE, "dense_layers": 1}) as llm:
        tokens(llm, MIXED)
        counts = metrics.snapshot()
    assert counts["sparse_layers"] == LAYERS - 1
    assert len(chunks) % (LAYERS - 1) == 0 and len(chunks) > 0


@pytest.mark.parametrize("policy", [name for name in PREFILL_POLICIES if name != "dense"])
def test_policies_prefill_in_parts(tiny, policy, chunks, monkeypatch):
    """A table that holds two blocks at a time gives the tokens of one that holds the chunk."""
    from vllm_sparse.prefill import buffers

    sparse = {**LITTLE, "prefill_policy": policy}
    settings = {"max_num_batched_tokens": 512, "enable_prefix_caching": False}
    with tiny.start(sparse=sparse, **settings) as llm:
        expected = tokens(llm, MIXED)
    monkeypatch.setattr(buffers.PrefillBuffers, "blocks_at_once", lambda self, chunk: 2)
    with tiny.start(sparse=sparse, **settings) as llm:
        assert tokens(llm, MIXED) == expected
    assert chunks

"""The backend inside the real engine, against stock vLLM on the same prompts."""

from __future__ import annotations

import pytest
from tiny_engine import (
    MIXED_LENGTHS,
    attention_layers,
    cached_tokens,
    engine_core,
    outputs,
    prompts,
    tokens,
)

from vllm_sparse import metrics
from vllm_sparse.policies import DECODE_POLICIES

pytestmark = pytest.mark.engine

LAYERS = 3
ALL_TOKENS = {"budget_tokens": 2048}
MIXED = prompts()


def assert_ran_sparse(sparse_layers: int = LAYERS) -> dict:
    counts = metrics.snapshot()
    assert counts["sparse_layers"] == sparse_layers
    assert counts["context_tokens"] > 0
    return counts


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("policy", DECODE_POLICIES)
def test_budget_covers_context(tiny, policy, kernel):
    """Continuous batching, chunked prefill and prefix hits included."""
    assert max(MIXED_LENGTHS) > 256 and len(MIXED) > 4, "no chunked prefill, or no continuous batching"
    with tiny.start(sparse={**ALL_TOKENS, "decode_policy": policy, "attention_kernel": kernel}) as llm:
        first, second = outputs(llm, MIXED), outputs(llm, MIXED)
        (counts,) = llm.collective_rpc("sparse_metrics")
    expected = tiny.stock(MIXED)
    assert [list(output.outputs[0].token_ids) for output in first] == expected
    assert [list(output.outputs[0].token_ids) for output in second] == expected
    assert not any(cached_tokens(first))
    assert cached_tokens(second) == [(length - 1) // 32 * 32 for length in MIXED_LENGTHS]
    assert counts["attended_tokens"] == counts["context_tokens"]
    assert counts["sparse_layers"] == (0 if policy == "dense" else LAYERS)
    assert (counts["context_tokens"] > 0) == (policy != "dense"), "counts are those of layers that select"


@pytest.mark.seam
def test_stock_tokens_vary(tiny):
    """Guards the comparisons of this file: a model that repeats one token would pass them all."""
    answers = tiny.stock(MIXED)
    assert len(set(map(tuple, answers))) == len(MIXED)
    assert all(len(set(answer)) > 4 for answer in answers)


@pytest.mark.seam
def test_shared_prefix(tiny):
    """A prefix shared between running requests gives stock tokens."""
    batch = prompts((400, 390, 333, 401, 96, 97), seed=2, shared=320)
    expected = tiny.stock(batch)
    with tiny.start(sparse=ALL_TOKENS, max_num_seqs=8) as llm:
        tokens(llm, batch[:1], 1)
        results = outputs(llm, batch)
        assert_ran_sparse()
    assert cached_tokens(results) == [384, 320, 320, 320, 64, 96]
    assert [list(output.outputs[0].token_ids) for output in results] == expected


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_page_sizes(tiny, page_size):
    expected = tiny.stock(MIXED)
    with tiny.start(sparse=ALL_TOKENS, block_size=page_size) as llm:
        assert {layer.impl.page_size for layer in attention_layers(llm).values()} == {page_size}
        assert tokens(llm, MIXED) == expected
        assert_ran_sparse()


@pytest.mark.seam
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny, dtype):
    """Half precision agrees with stock up to rounding."""
    expected = tiny.stock(MIXED, dtype=dtype)
    with tiny.start(sparse=ALL_TOKENS, dtype=dtype) as llm:
        got = tokens(llm, MIXED)
        assert_ran_sparse()
    # Where rounding flips one token, the rest of that answer is another text.
    same = sum(
        a == b for mine, theirs in zip(got, expected, strict=True) for a, b in zip(mine, theirs, strict=True)
    )
    assert same > 0.5 * 16 * len(MIXED)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)], ids=["group1", "group3", "group7"])
def test_group_sizes(tiny, heads):
    model = tiny.model(num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=32 * heads[0])
    expected = tiny.stock(MIXED, model=model)
    with tiny.start(model, ALL_TOKENS) as llm:
        assert tokens(llm, MIXED) == expected
        assert_ran_sparse()


@pytest.mark.seam
def test_short_rows_beside_long_ones(tiny):
    """From 16 decode rows on, short contexts run densely beside the sparse engine."""
    from vllm_sparse.backend.residency import SHORT_ROWS_DENSE_FROM

    batch = prompts((*range(3, 3 + 2 * SHORT_ROWS_DENSE_FROM, 2), 500, 700), seed=3)
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 2048}
    expected = tiny.stock(batch, **settings)
    with tiny.start(sparse=ALL_TOKENS, **settings) as llm:
        assert tokens(llm, batch) == expected
        assert_ran_sparse()
    with tiny.start(sparse={"min_context_tokens": 400}, **settings) as llm:
        got = tokens(llm, batch)
        counts = assert_ran_sparse()
    assert got[:-2] == expected[:-2], "a short row was not dense"
    assert got[-2:] != expected[-2:], "the long rows were dense too"
    assert counts["attended_tokens"] < counts["context_tokens"]


def expected_counts(prompt_tokens, max_tokens, page_size, budget_tokens) -> tuple[int, int]:
    """(attended, context) tokens of the decode steps of one request."""
    attended = context = 0
    for seq_len in range(prompt_tokens + 1, prompt_tokens + max_tokens):
        *full_pages, last_page = [page_size] * (seq_len // page_size) + [seq_len % page_size or page_size]
        if seq_len % page_size == 0:
            full_pages = full_pages[:-1]
        budget_pages = budget_tokens // page_size
        whole = len(full_pages) + 1 <= budget_pages
        skipped = 0 if whole else len(full_pages) + 1 - budget_pages
        attended += sum(full_pages[skipped:]) + last_page
        context += seq_len
    return attended, context


@pytest.mark.seam
@pytest.mark.parametrize("policy", DECODE_POLICIES)
def test_small_budget_is_exact(tiny, policy, monkeypatch):
    """The counters, the arithmetic, and what the attention engine was really given all agree."""
    from vllm_sparse.attention.torch_attn import TorchAttention

    given = []
    attend = TorchAttention.attend

    def spy(self, q, kv, table, *args):
        given.append(table.lengths.sum().item())
        pages = -(-table.lengths // kv.shape[2])
        assert all(
            len(set(row[:n])) == n for row, n in zip(table.head_pages.tolist(), pages.tolist(), strict=True)
        )
        attend(self, q, kv, table, *args)

    monkeypatch.setattr(TorchAttention, "attend", spy)
    with tiny.start(sparse={"decode_policy": policy, "budget_tokens": 130}, block_size=16) as llm:
        tokens(llm, prompts((250,)), 40)
        counts = metrics.snapshot()
    chooses = DECODE_POLICIES[policy]
    attended, context = expected_counts(250, 40, 16, 130)
    assert attended < context
    if policy == "dense":
        attended = context = 0
    kv_heads = 2
    if chooses.adaptive:
        assert 0 < sum(given) < attended * LAYERS * kv_heads, "no row ended before its budget"
    else:
        assert sum(given) == attended * LAYERS * kv_heads
    assert (counts["attended_tokens"], counts["context_tokens"]) == (attended, context)


@pytest.mark.parametrize("policy", ["quest", "random", "oracle", "streaming"])
def test_small_budget_is_deterministic(tiny, policy):
    """A small budget gives the same tokens in each run and in any batch."""
    sparse = {"decode_policy": policy}
    with tiny.start(sparse=sparse, enable_prefix_caching=False) as llm:
        first, again = tokens(llm, MIXED, 24), tokens(llm, MIXED, 24)
        alone = [tokens(llm, [prompt], 24)[0] for prompt in MIXED]
        counts = assert_ran_sparse()
    assert counts["attended_tokens"] < counts["context_tokens"]
    assert first == again == alone
    assert first != tiny.stock(MIXED, 24), "the budget changed nothing: this test would pass on a dense backend"


@pytest.mark.seam
def test_min_context_tokens(tiny):
    """Up to ``min_context_tokens`` requests get stock tokens."""
    with tiny.start(sparse={"min_context_tokens": 320}) as llm:
        got = tokens(llm, MIXED)
        counts = assert_ran_sparse()
    expected = tiny.stock(MIXED)
    assert got[:4] == expected[:4], "a prompt of up to 300 + 16 tokens was not dense"
    assert got[4] != expected[4], "the prompt of 700 tokens was dense too"
    assert counts["attended_tokens"] < counts["context_tokens"]


@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3, 9])
def test_dense_layers(tiny, dense_layers):
    with tiny.start(sparse={"preset": "fast", "dense_layers": dense_layers}) as llm:
        got = tokens(llm, MIXED)
        layers = [layer.impl for layer in attention_layers(llm).values()]
        rows = {impl.pages.cache_slots for impl in layers}
        counts = metrics.snapshot()
    dense = min(dense_layers, LAYERS)
    assert [impl.is_sparse for impl in layers] == [False] * dense + [True] * (LAYERS - dense)
    assert rows == {32 if dense == LAYERS else 33}, "summaries that nobody reads, or none for who does"
    assert counts["sparse_layers"] == LAYERS - dense
    assert sum(counts["dense_layers"].values()) == dense
    assert (got == tiny.stock(MIXED)) == (dense == LAYERS)
    assert (counts["context_tokens"] > counts["attended_tokens"]) == (dense < LAYERS)


@pytest.mark.seam
def test_aborted_requests(tiny):
    """Aborted requests leave the others and their successors right."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    got = {}
    # So few blocks that later requests reuse those of aborted ones.
    with tiny.start(sparse=ALL_TOKENS, kv_cache_memory_bytes=4 << 20) as llm:
        engine = llm.llm_engine
        for index, prompt in enumerate(MIXED * 2):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        step, aborted = 0, {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    got[int(output.request_id)] = list(output.outputs[0].token_ids)
            step += 1
            victim = {3: "4", 9: "8", 14: "3"}.get(step)
            if victim is not None and int(victim) not in got:
                aborted[int(victim)] = True
                engine.abort_request([victim])
        assert not engine_core(llm).scheduler.running
        later = tokens(llm, MIXED)
    expected = tiny.stock(MIXED)
    assert aborted and not all(len(got.get(index, [])) == 16 for index in aborted)
    assert {i: t for i, t in got.items() if i not in aborted} == {
        i: expected[i % 5] for i in range(10) if i not in aborted
    }
    assert later == expected


@pytest.mark.seam
@pytest.mark.parametrize("kinds", [{"backend": "sparse"}, {"backend_per_kind": {"full_attention": "sparse"}}])
def test_attention_config_selects_the_backend(tiny, kinds):
    expected = tiny.stock(MIXED)
    with tiny.start(sparse=ALL_TOKENS, backend=None, attention_config=kinds) as llm:
        assert tokens(llm, MIXED) == expected
        assert_ran_sparse()

"""Requests that lose their pages to others and come back, in the real engine."""

from __future__ import annotations

import pytest
from test_cache_summary import EngineWrites
from tiny_engine import outputs, preemptions, prompts, tokens

from vllm_sparse import metrics

pytestmark = pytest.mark.engine

BATCH = prompts((100, 130, 90, 111), seed=5)
MAX_TOKENS = 90
ENGINE = {"max_model_len": 256, "block_size": 16}
ROOM = {**ENGINE, "kv_cache_memory_bytes": 8 << 20}
# Bytes of the 32 pages of 16 rows and a summary: two of the four requests fit to their end.
PAGE_BYTES = 3 * 2 * (16 + 1) * 2 * 32 * 4
TIGHT = {**ENGINE, "kv_cache_memory_bytes": 32 * PAGE_BYTES}


def run(tiny, monkeypatch, sparse, settings) -> tuple[list, dict[int, int]]:
    """Tokens of BATCH, and the outputs that each preempted request had when it was first preempted."""
    writes = EngineWrites(monkeypatch)
    with preemptions() as seen, tiny.start(sparse=sparse, **settings) as llm:
        answers = tokens(llm, BATCH, MAX_TOKENS)
        counts = metrics.snapshot()
        assert writes.check(llm)
    assert counts["sparse_layers"] == 3
    first = {}
    for request, done in seen:
        first.setdefault(int(request), done)
    return answers, first


@pytest.mark.seam
@pytest.mark.parametrize("caching", [True, False], ids=["prefix_cache", "no_prefix_cache"])
def test_preemption_with_budget_of_everything(tiny, caching, monkeypatch):
    """Preempted requests with a budget of everything give stock tokens."""
    expected = tiny.stock(BATCH, MAX_TOKENS, **ROOM)
    settings = {**TIGHT, "enable_prefix_caching": caching}
    answers, preempted = run(tiny, monkeypatch, {"budget_tokens": 2048}, settings)
    assert preempted, "no request was preempted"
    assert any(preempted.values()), "no request was preempted while it was decoding"
    assert answers == expected


def test_answers_agree_up_to_preemption(tiny, monkeypatch):
    """After it they may differ: the resumed request's own tokens are recomputed as prefill, densely."""
    sparse = {"budget_tokens": 96}
    expected, none = run(tiny, monkeypatch, sparse, ROOM)
    answers, preempted = run(tiny, monkeypatch, sparse, TIGHT)
    assert not none and preempted
    assert len(preempted) < len(BATCH), "every request was preempted: nothing is left to compare in full"
    for request, (answer, untouched) in enumerate(zip(answers, expected, strict=True)):
        same = preempted.get(request, MAX_TOKENS)
        assert answer[:same] == untouched[:same], f"request {request}"
        assert len(answer) == MAX_TOKENS


def test_preemption_is_deterministic(tiny, monkeypatch):
    assert run(tiny, monkeypatch, {"budget_tokens": 96}, TIGHT) == run(
        tiny, monkeypatch, {"budget_tokens": 96}, TIGHT
    )


@pytest.mark.seam
def test_prompts_beyond_the_cache_wait(tiny, monkeypatch):
    """Prompts beyond the cache wait for each other."""
    expected = tiny.stock(BATCH, 8, **ROOM)
    writes = EngineWrites(monkeypatch)
    with tiny.start(sparse={"budget_tokens": 2048}, **{**TIGHT, "kv_cache_memory_bytes": 18 * PAGE_BYTES}) as llm:
        results = outputs(llm, BATCH, 8)
        assert writes.check(llm)
    assert [list(result.outputs[0].token_ids) for result in results] == expected

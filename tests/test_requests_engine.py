"""Budgets and exact attention of single requests in the real engine, among others in a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from test_drafts_engine import Proposer, ngrams
from test_preemption import BATCH, MAX_TOKENS, ROOM, TIGHT
from tiny_engine import cached_tokens, engine_core, preemptions, prompts

from vllm_sparse import metrics

pytestmark = pytest.mark.engine

PROMPTS = prompts((300, 700, 500))
SMALL, EXACT = {"sparse_budget": 128}, {"sparse": False}
ASKS = [None, SMALL, EXACT]
OFFLOAD = {"host_gib": 0.05}


def outputs(llm, token_lists, asks, max_tokens: int = 16) -> list:
    """Greedy request outputs, each of a request that asks for one of ``asks``."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=ask) for ask in asks
    ]
    return llm.generate([{"prompt_token_ids": ids} for ids in token_lists], params, use_tqdm=False)


def tokens(llm, token_lists, asks, max_tokens: int = 16) -> list[list[int]]:
    return [list(result.outputs[0].token_ids) for result in outputs(llm, token_lists, asks, max_tokens)]


@pytest.mark.seam
@pytest.mark.parametrize("offload", [None, OFFLOAD], ids=["resident", "offload"])
def test_each_request_of_a_batch_gets_what_it_asks_for(tiny, offload):
    """As an engine with its budget answers, and as stock vLLM does."""
    settings = {"max_num_seqs": 16, "enable_prefix_caching": False}
    with tiny.start(sparse={"budget_tokens": 128, "offload": offload}, **settings) as llm:
        small = tokens(llm, PROMPTS, [None] * 3)
    with tiny.start(sparse={"budget_tokens": 256, "offload": offload}, **settings) as llm:
        usual = tokens(llm, PROMPTS, [None] * 3)
        metrics.reset_counts(None)
        both = tokens(llm, PROMPTS * 3, [ask for ask in ASKS for _ in PROMPTS])
        counts = metrics.snapshot()
        # Rows of one step are those of other requests in the next: nothing is left of what they asked for.
        assert tokens(llm, PROMPTS, [None] * 3) == usual
    expected = [usual, small, tiny.stock(PROMPTS)]
    assert [both[:3], both[3:6], both[6:]] == expected
    assert usual != small != expected[2] != usual, "budgets change nothing: this test would pass without any"
    # The first token of an answer is the prompt's.
    steps = [length + step for length in map(len, PROMPTS) for step in range(1, 16)]
    whole, of_budget = sum(steps), [sum(n - (-(-n // 32) - pages) * 32 for n in steps) for pages in (8, 4)]
    assert counts["context_tokens"] == 3 * whole
    assert counts["attended_tokens"] == whole + sum(of_budget)


@pytest.mark.seam
def test_exact_requests_share_no_pages_with_others(tiny):
    """Neither those of a sparse prompt nor those of a sparse answer; they share their own."""
    prefill = {"prefill_policy": "a_shape", "min_prefill_tokens": 0, "vertical_tokens": 32, "slash_tokens": 32}
    expected = tiny.stock(PROMPTS)
    with tiny.start(sparse={"budget_tokens": 256, **prefill}) as llm:
        sparse = outputs(llm, PROMPTS, [None] * 3)
        answers = [list(result.outputs[0].token_ids) for result in sparse]
        exact, again = outputs(llm, PROMPTS, [EXACT] * 3), outputs(llm, PROMPTS, [EXACT] * 3)
        small = outputs(llm, PROMPTS, [SMALL] * 3)
        beside = tokens(llm, PROMPTS, [None, EXACT, SMALL])
    assert answers != expected
    for results in (exact, again):
        assert [list(result.outputs[0].token_ids) for result in results] == expected
    full = [(len(prompt) - 1) // 32 * 32 for prompt in PROMPTS]
    assert cached_tokens(sparse) == cached_tokens(exact) == [0] * 3
    assert cached_tokens(again) == cached_tokens(small) == full, "budgets share pages, whatever they are"
    assert beside[1] == expected[1]


@pytest.mark.seam
def test_exact_requests_survive_preemption(tiny):
    expected = tiny.stock(BATCH, MAX_TOKENS, **ROOM)
    asks = [EXACT, {"sparse_budget": 112}, EXACT, None]
    with preemptions() as seen, tiny.start(sparse={"budget_tokens": 128}, **TIGHT) as llm:
        answers = tokens(llm, BATCH, asks, MAX_TOKENS)
    assert seen, "no request was preempted"
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert answers[1] != expected[1] and answers[3] != expected[3]


@pytest.mark.parametrize("offload", [None, OFFLOAD], ids=["resident", "offload"])
def test_exact_requests_with_drafts(tiny, monkeypatch, offload):
    proposer, expected = Proposer(monkeypatch), tiny.stock(PROMPTS, 24)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    sparse = {"budget_tokens": 256, "offload": offload}
    with tiny.start(sparse=sparse, speculative_config=ngrams(3), max_num_seqs=8) as llm:
        both = tokens(llm, PROMPTS * 2, [EXACT] * 3 + [SMALL] * 3, 24)
    assert both[:3] == expected and both[3:] != expected
    assert max(proposer.lengths) == 4


def test_a_request_takes_less_of_an_engine_that_attends_to_everything(tiny):
    """And of one that runs the dense backend beside a large batch."""
    batch = [PROMPTS[0]] * 16 + PROMPTS
    with tiny.start(sparse={"budget_tokens": 128}, enable_prefix_caching=False) as llm:
        small = tokens(llm, PROMPTS, [None] * 3)
    with tiny.start(sparse={"budget_tokens": 2048}, max_num_seqs=32, max_num_batched_tokens=2048) as llm:
        asks = [EXACT, None] * 8 + [SMALL] * 3
        answers = tokens(llm, batch, asks)
    assert answers[:16] == [tiny.stock(PROMPTS)[0]] * 16
    assert answers[16:] == small


def test_stock_engines_take_what_they_do_not_read(tiny):
    with tiny.start(backend="CPU_ATTN") as llm:
        asked = tokens(llm, PROMPTS, [{"sparse": False}, {"sparse_budget": "any"}, {"sparse_x": 1}])
    assert asked == tiny.stock(PROMPTS)


def test_wrong_values_are_refused_where_requests_arrive(tiny):
    with tiny.start(sparse={"budget_tokens": 256}) as llm:
        for ask, said in (
            ({"sparse_budget": 127}, "from 128"), ({"sparse_budget": 257}, "to 256"),
            ({"sparse": "off"}, "true, false"), ({"sparse_budge": 128}, "'sparse_budget'"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=said):
                tokens(llm, PROMPTS[:1], [ask])
        request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"sparse_budget": 257}))
        with pytest.raises(ValueError, match="to 256"):  # for a client that passes by the check above
            engine_core(llm).preprocess_add_request(request)
        assert tokens(llm, PROMPTS[:1], [EXACT]) == tiny.stock(PROMPTS)[:1]

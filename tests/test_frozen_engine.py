"""Pages chosen once, at the end of prefill, in the real engine."""

from __future__ import annotations

import pytest
from test_preemption import BATCH, MAX_TOKENS, ROOM, TIGHT
from tiny_engine import cached_tokens, outputs, preemptions, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.backend.impl import SparseImpl
from vllm_sparse.config import ConfigError
from vllm_sparse.decode_plan import WHOLE

pytestmark = pytest.mark.engine

PAGE = 16
# No prompt is cut into chunks, so that a request's list is of the same queries in any company.
ENGINE = {"block_size": PAGE, "max_num_batched_tokens": 2048}
policies = pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])


class Choices:
    """Pages that each decode step of a layer attended to, of the only request; none of a prompt token that comes
    alone, which attends to all."""

    def __init__(self, monkeypatch, layer: int = 1):
        self.steps: list[tuple[int, list[set[int]]]] = []
        decode = SparseImpl._decode

        def record(impl, query, kv_cache, md, output):
            decode(impl, query, kv_cache, md, output)
            if impl.layer_index == layer and int(md.table.routes[0]) != WHOLE:
                blocks, pages = md.block_table[0].tolist(), -(-md.table.lengths // PAGE)
                rows = [md.table.units[row, : pages[row]] // impl.num_kv_heads for row in range(impl.num_kv_heads)]
                self.steps.append((int(md.seq_lens[0]), [{blocks.index(u) for u in row.tolist()} for row in rows]))

        monkeypatch.setattr(SparseImpl, "_decode", record)


@pytest.mark.seam
@policies
def test_the_choice_of_a_prompt_stays(tiny, policy, monkeypatch):
    choices = Choices(monkeypatch)
    with tiny.start(sparse={"decode_policy": policy, "budget_tokens": 10 * PAGE}, **ENGINE) as llm:
        tokens(llm, prompts((450,), seed=4), 150)
        counts = metrics.snapshot()
    assert counts["attended_tokens"] < counts["context_tokens"]
    assert [length for length, _ in choices.steps] == list(range(451, 600))
    first = choices.steps[0][1]
    assert first[0] != first[1], "heads chose the same pages, as if by age"
    shares = [len(pages) for pages in first]
    assert sum(shares) == 20 and (shares == [10, 10]) == (policy == "snapkv")
    before = first
    for length, heads in choices.steps:
        prompt = [{page for page in pages if page <= 449 // PAGE} for pages in heads]
        new = (length - 1) // PAGE - 449 // PAGE
        for head, pages in enumerate(heads):
            budget = shares[head] - 1  # beside the sink
            assert len(pages) == shares[head]
            assert len(pages - prompt[head]) == min(new, budget // 2), "new pages take up to half"
            # The page at the prompt's end may have stood in for the window's third page.
            assert len(prompt[head] - before[head]) == 0, "a page of the prompt was chosen later"
        before = prompt


@policies
def test_others_that_share_the_prefix_change_nothing(tiny, policy):
    batch = prompts((500, 480, 431), seed=2, shared=320)
    sparse = {"decode_policy": policy, "budget_tokens": 10 * PAGE}
    with tiny.start(sparse=sparse, **ENGINE) as llm:
        alone = []
        for prompt in batch:
            llm.reset_prefix_cache()
            alone += tokens(llm, [prompt], 40)
        llm.reset_prefix_cache()
        tokens(llm, batch[:1], 1)
        after = outputs(llm, batch[1:], 40)
        llm.reset_prefix_cache()
        together = tokens(llm, batch, 40)
        llm.reset_prefix_cache()
        reused = [tokens(llm, [prompt], 40)[0] for prompt in reversed(batch)]
    assert cached_tokens(after) == [320, 320]
    assert [list(output.outputs[0].token_ids) for output in after] == alone[1:]
    assert together == alone
    assert reused[::-1] == alone
    assert alone != tiny.stock(batch, 40, **ENGINE), "the budget changed nothing"


@policies
def test_a_prompt_that_is_cached_but_for_a_token_is_served(tiny, policy):
    """Its last token is a decode row that begins a page and looks for a list; there is one where a chunk ended."""
    prompt = prompts((449,), seed=8)
    sparse = {"decode_policy": policy, "budget_tokens": 10 * PAGE}
    with tiny.start(sparse=sparse, block_size=PAGE, max_num_batched_tokens=PAGE * 14) as llm:
        first, again = outputs(llm, prompt, 40), outputs(llm, prompt, 40)
    assert cached_tokens(again) == [448]
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids, "chunks end at 224 and 448"


@policies
def test_a_prompt_that_comes_again_finds_a_list_whatever_the_cache_lacks_of_it(tiny, policy, monkeypatch):
    """As other samples of the same prompt do; the last of its tokens alone is in a page that is not whole."""
    prompt, choices = prompts((449,), seed=8), Choices(monkeypatch)
    with tiny.start(sparse={"decode_policy": policy, "budget_tokens": 10 * PAGE}, **ENGINE) as llm:
        outputs(llm, prompt, 2)
        again = outputs(llm, prompt, 2)
    assert cached_tokens(again) == [448]
    assert [length for length, _ in choices.steps] == [450, 450], "the last prompt token chose pages"
    newest = {0, *range(20, 29)}
    for _, heads in choices.steps:
        assert sum(map(len, heads)) == 20, "more than the budget"
        assert newest not in heads, "chosen by age"


@policies
def test_preempted_requests_end(tiny, policy):
    sparse = {"decode_policy": policy, "budget_tokens": 96}
    answers = {}
    for name, settings in (("room", ROOM), ("tight", TIGHT)):
        with preemptions() as seen, tiny.start(sparse=sparse, **{**settings, **ENGINE}) as llm:
            answers[name] = tokens(llm, BATCH, MAX_TOKENS)
    first: dict[int, int] = {}
    for request, done in seen:
        first.setdefault(int(request), done)
    assert first and len(first) < len(BATCH)
    for request, (mine, expected) in enumerate(zip(answers["tight"], answers["room"], strict=True)):
        same = first.get(request, MAX_TOKENS)
        assert len(mine) == MAX_TOKENS and mine[:same] == expected[:same], f"request {request}"


@policies
def test_small_chunks_give_the_same_on_every_run(tiny, policy):
    batch = prompts((300, 700, 40, 555, 1), seed=9)
    with tiny.start(sparse={"decode_policy": policy}, block_size=PAGE, enable_prefix_caching=False) as llm:
        assert tokens(llm, batch, 24) == tokens(llm, batch, 24)


@pytest.mark.seam
def test_drafts_are_refused(tiny):
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with (
        pytest.raises(ValueError, match=r"sparse\.decode_policy: 'snapkv' with --speculative-config"),
        tiny.start(sparse={"decode_policy": "snapkv"}, speculative_config=drafts, **ENGINE),
    ):
        pass


def test_a_budget_beyond_a_list_does_not_start(tiny):
    with (
        pytest.raises(
            ConfigError, match=r"budget_tokens: 129 pages of 16 tokens .* lists 125 pages at head size 32"
        ),
        tiny.start(sparse={"decode_policy": "snapkv", "budget_tokens": 129 * PAGE}, **ENGINE),
    ):
        pass

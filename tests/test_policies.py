"""What every policy's choice of pages must be, and that informed choices beat blind ones."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DEVICE, Case, make

from vllm_sparse import kernels
from vllm_sparse.kernels import reference
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.summaries import SUMMARIES
from vllm_sparse.policies import DECODE_POLICIES

SCORING = [name for name in DECODE_POLICIES if name != "dense"]
policies = pytest.mark.parametrize("policy", SCORING)


def made_for(policy: str, *args, **kwargs) -> Case:
    """A case whose pages hold the policy's summary; equal seeds give equal keys and queries."""
    return make(*args, summary=DECODE_POLICIES[policy].summary, **kwargs)


def choose(case: Case, policy: str, sink_pages: int = 1, window_tokens: int = 20) -> list[list[list[int]]]:
    """Positions of the chosen pages, by request and KV head, as the engines are given them."""
    run = kernels.for_device(DEVICE)
    DECODE_POLICIES[policy].score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    top_p = 0.9 if DECODE_POLICIES[policy].adaptive else 0.0
    run.select_pages(
        case.scores, case.block_table, case.plan, case.kv,
        case.selection(sink_pages, window_tokens, top_p=top_p), case.table,
    )  # fmt: skip
    chosen = []
    for request, seq_len in enumerate(case.seq_lens.tolist()):
        blocks = case.block_table[request, : -(-seq_len // case.page_size)].tolist()
        heads = []
        for head in range(case.kv_heads):
            row = request * case.kv_heads + head
            count = -(-int(case.table.lengths[row]) // case.page_size)
            named, owners = HeadPageGrid.of(case.kv).split(case.table.head_pages[row, :count])
            assert (owners == head).all(), f"row of KV head {head} names pages of {owners.unique().tolist()}"
            heads.append([blocks.index(block) for block in named.tolist()])
        chosen.append(heads)
    return chosen


@policies
@pytest.mark.parametrize("seed", range(12))
def test_chosen_pages_hold_invariants(policy, seed):
    rng = random.Random(seed)
    page_size, sink_pages, window_tokens = (
        rng.choice([16, 32, 64]),
        rng.choice([0, 1, 2]),
        rng.choice([0, 1, 20, 64]),
    )
    least = sink_pages + -(-window_tokens // page_size) + 2
    budget_pages = least + rng.randrange(6)
    edges = [1, page_size, page_size + 1, budget_pages * page_size, budget_pages * page_size + 1]
    lengths = [0, *rng.sample(edges, 3), *(rng.randrange(1, 60 * page_size) for _ in range(3))]
    heads = rng.choice([1, 2, 3])
    group, head_dim = rng.choice([1, 3, 4, 7]), rng.choice([32, 64])
    case = made_for(policy, lengths, heads, group, head_dim, page_size, budget_pages, seed=seed)
    for seq_len, by_head in zip(lengths, choose(case, policy, sink_pages, window_tokens), strict=True):
        pages = -(-seq_len // page_size)
        assert len(by_head) == heads
        for chosen in by_head:
            assert chosen == sorted(set(chosen)), "not ascending, or a page twice"
            if not DECODE_POLICIES[policy].adaptive or pages <= budget_pages:
                assert len(chosen) == min(pages, budget_pages), "not the budget"
            assert len(chosen) <= budget_pages
            if not seq_len:
                continue
            assert chosen[-1] == pages - 1, "the current page is missing, or a page past the context is there"
            assert set(range(min(sink_pages, pages))) <= set(chosen), "a sink is missing"
            oldest_in_window = max(0, seq_len - max(window_tokens, 1))
            assert set(range(oldest_in_window // page_size, pages)) <= set(chosen), "the window is incomplete"
    if not DECODE_POLICIES[policy].adaptive:
        lengths_of_rows = case.table.lengths.view(len(lengths), heads)
        for seq_len, row in zip(lengths, lengths_of_rows.tolist(), strict=True):
            skipped = max(0, -(-seq_len // page_size) - budget_pages)
            assert set(row) == {seq_len - skipped * page_size}


@policies
def test_budget_covers_context(policy):
    lengths = [1, 16, 95, 96]
    case = made_for(policy, lengths, budget_pages=6)
    assert choose(case, policy) == [[list(range(-(-n // 16)))] * 2 for n in lengths]


@policies
def test_choice_is_independent_of_the_batch(policy):
    """Choice of a request does not depend on its batch."""
    batch = made_for(policy, [333, 77, 600, 1], seed=5)
    together = choose(batch, policy)
    for request in range(4):
        alone = made_for(policy, [333, 77, 600, 1], seed=5)
        for name in ("q", "block_table", "seq_lens"):
            setattr(alone, name, getattr(alone, name)[request : request + 1])
        empty = make([int(alone.seq_lens[0])], seed=0)
        alone.plan, alone.scores, alone.table = empty.plan, empty.scores, empty.table
        assert choose(alone, policy) == together[request : request + 1]


def cluster(case: Case, summary: str, seed: int = 0) -> None:
    """Give each page keys around a centre of its own: some pages then matter to a query, most do not."""
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = case.kv_heads, case.q.shape[2]
    for request, seq_len in enumerate(case.seq_lens.tolist()):
        blocks = case.block_table[request, : -(-seq_len // case.page_size)].cpu().long()
        centres = 1.5 * torch.randn(len(blocks), 1, heads, head_dim, generator=generator)
        keys = centres + 0.5 * torch.randn(len(blocks), case.page_size, heads, head_dim, generator=generator)
        slots = blocks[:, None] * case.page_size + torch.arange(case.page_size)
        keys, slots = keys.flatten(0, 1)[:seq_len].to(DEVICE), slots.flatten()[:seq_len].to(DEVICE)
        reference.page_write(keys, torch.zeros_like(keys), case.kv, slots, case.page_size, summary)


def captured(case: Case, chosen: list[list[list[int]]]) -> torch.Tensor:
    """Share of the attention mass on the chosen pages, float64 [num_reqs, kv_heads], mean over each group."""
    group, head_dim = case.q.shape[1] // case.kv_heads, case.q.shape[2]
    shares = torch.zeros(len(chosen), case.kv_heads, dtype=torch.float64)
    for request, seq_len in enumerate(case.seq_lens.tolist()):
        blocks = case.block_table[request, : -(-seq_len // case.page_size)].long()
        for head, pages in enumerate(chosen[request]):
            keys = case.kv[blocks, head, : case.page_size, :head_dim].flatten(0, 1)[:seq_len].double()
            queries = case.q[request, head * group : (head + 1) * group].double()
            mass = (queries @ keys.T * case.scale).softmax(-1).mean(0).cpu()
            mass = torch.nn.functional.pad(mass, (0, -seq_len % case.page_size)).view(-1, case.page_size).sum(1)
            shares[request, head] = mass[pages].sum()
    return shares


@pytest.mark.parametrize("group", [1, 4, 7])
def test_informed_policies_beat_blind_ones(group):
    """Informed policies capture more attention than blind ones."""
    shares = {}
    for policy in SCORING:
        case = made_for(policy, [1500, 999, 640], 2, group, 64, 16, 8, seed=3)
        cluster(case, DECODE_POLICIES[policy].summary)
        shares[policy] = captured(case, choose(case, policy))
    for policy in SCORING:
        assert (shares["oracle"] >= shares[policy] - 1e-6).all(), f"{policy} beat the best possible choice"
    mean = {policy: share.mean().item() for policy, share in shares.items()}
    assert mean["quest"] > 1.5 * mean["random"]
    assert mean["quest"] > 1.5 * mean["streaming"]
    assert mean["quest"] > 0.8 * mean["oracle"]
    assert mean["sketch"] > 0.95 * mean["oracle"]
    assert mean["sketch2"] > 0.98 * mean["oracle"]


@pytest.mark.parametrize("policy", ["quest", "sketch", "sketch2"])
def test_one_matching_key_is_found(policy):
    """One key that matches is found in a long context."""
    case = made_for(policy, [1600], 2, 1, 64, 16, 6, seed=9)
    block = int(case.block_table[0, 41])
    keys = case.kv[block, :, :16, :64].transpose(0, 1).clone()
    keys[5] = 4 * case.q[0]
    slots = torch.arange(block * 16, block * 16 + 16, device=DEVICE)
    summary = DECODE_POLICIES[policy].summary
    reference.page_write(keys, torch.zeros_like(keys), case.kv, slots, 16, summary)
    assert all(41 in chosen for chosen in choose(case, policy)[0])


def test_twilight_stops_early():
    """Twilight takes few pages where few hold the attention."""
    case = made_for("twilight", [1600], 2, 3, 64, 16, 40, seed=9)
    cluster(case, "sketch2")
    spread = choose(case, "twilight")[0]
    case.q *= 6
    sharp = choose(case, "twilight")[0]
    share = captured(case, [sharp])
    for few, many in zip(sharp, spread, strict=True):
        assert 3 <= len(few) < 20 and len(few) < len(many) <= 40
        assert few[0] == 0 and few[-2:] == [98, 99], "a sink or the window is missing"
    assert (share > 0.85).all() and (share < 0.999).all()


def test_streaming_takes_sinks_and_recent_pages():
    """Streaming takes sinks and the most recent pages."""
    case = make([1000, 64], budget_pages=6)
    assert choose(case, "streaming", sink_pages=2) == [[[0, 1, 59, 60, 61, 62]] * 2, [[0, 1, 2, 3]] * 2]


def test_random_repeats_by_run_not_by_step():
    """``random`` is the same on every run, and new for each head and step."""
    first, again, next_step = (make([n, 777], 2, 1, seed=4) for n in (1500, 1500, 1501))
    chosen = choose(first, "random")
    assert choose(again, "random") == chosen
    assert chosen[0][0] != chosen[0][1], "heads chose the same pages"
    later = choose(next_step, "random")
    assert later[0][0] != chosen[0][0], "the next step chose the same pages"
    assert later[1] == chosen[1], "another request's length changed the choice"


def test_random_reaches_every_page():
    seen = set()
    for seq_len in range(1000, 1063):
        seen.update(*choose(make([seq_len], 4, 1, 32, seed=1), "random")[0])
    assert seen == set(range(67))


def test_summaries_are_known():
    assert {policy.summary for policy in DECODE_POLICIES.values()} <= set(SUMMARIES)
    case = make([100])
    with pytest.raises(AssertionError, match="scores nothing"):
        DECODE_POLICIES["dense"].score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)

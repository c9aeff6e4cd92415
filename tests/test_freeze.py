"""Lists of pages that a prompt leaves behind: what is listed, found, carried on and chosen."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, Case, error, make
from prefill_cases import make_chunk
from vllm_sparse.kernels import launchers, reference

from vllm_sparse import kernels
from vllm_sparse.config import ConfigError, SparseConfig
from vllm_sparse.freeze import Freeze, FreezeBuffers, check
from vllm_sparse.page_table import UnitGrid
from vllm_sparse.policies import DECODE_POLICIES, get_decode_policy
from vllm_sparse.probe import probe_parts
from vllm_sparse.query_blocks import QueryBlocks
from vllm_sparse.summaries import FROZEN, FROZEN_HEADER, NO_LIST, list_capacity

POISON = 777
SHAPES = [(2, 3, 64, 16), (1, 7, 32, 32), (3, 1, 96, 16), (2, 4, 128, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_group{}_d{}_page{}".format(*shape))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def entries(kv: torch.Tensor, page_size: int) -> torch.Tensor:
    """What pages list, int32 [num_blocks, kv_heads, header and pages]."""
    return kv.view(torch.int16)[:, :, page_size].int() & 0xFFFF


def case_of(shape, lengths, **kwargs) -> Case:
    kv_heads, group, head_dim, page_size = shape
    return make(lengths, kv_heads, group, head_dim, page_size, summary=FROZEN, **kwargs)


def freeze_of(case, kv_heads: int, budget_pages: int, shares: bool = False, window_tokens: int = 20) -> Freeze:
    q_heads = case.q.shape[1]
    longest = case.kv.shape[0] * case.page_size
    buffers = FreezeBuffers.allocate(q_heads, case.page_size, longest, case.kv.dtype, DEVICE)
    buffers.parts = torch.full((probe_parts(longest),), float("nan"), dtype=case.kv.dtype, device=DEVICE)
    buffers.mass.fill_(float("nan"))
    return Freeze(buffers, 1, window_tokens, budget_pages, shares, case.scale)


def list_pages(case: Case, request: int, tokens: int, mass=None, budget: tuple[int, int, int] = (5, 5, 5)) -> None:
    """Have the first ``tokens`` of a request end in a list."""
    chunk = QueryBlocks(request, 0, tokens, 0)
    pages, kv_heads = chunk.num_pages(case.page_size), case.kv_heads
    if mass is None:
        mass = torch.rand(kv_heads, 1, pages, device=DEVICE)
    blocks = case.block_table[request]
    reference.list_pages(mass, case.kv, blocks, chunk, case.page_size, 1, 20, *budget)


@shapes
@dtypes
def test_pages_begin_without_a_list_and_keep_the_one_they_get(shape, dtype):
    kv_heads, _, head_dim, page_size = shape
    expected = torch.zeros(6, kv_heads, page_size + 1, 2 * head_dim, dtype=dtype, device=DEVICE)
    expected.view(torch.int16).fill_(POISON)
    actual = expected.clone()
    for slots in ([3 * page_size - 1, *range(4 * page_size, 5 * page_size), -1], [page_size, 2 * page_size + 1]):
        slots = torch.tensor(slots, device=DEVICE)
        key, value = torch.randn(2, len(slots), kv_heads, head_dim, device=DEVICE).to(dtype)
        for write, kv in ((reference.page_write, expected), (launchers.page_write, actual)):
            write(key, value, kv, slots, page_size, FROZEN)
    assert torch.equal(actual.nan_to_num(123.0), expected.nan_to_num(123.0))
    for kv in (actual, expected):
        begun = torch.tensor([False, True, False, False, True, False], device=DEVICE)
        assert entries(kv, page_size)[begun, :, :4].unique(dim=0).tolist() == [[[NO_LIST, 0, 0, 0]] * kv_heads]
        assert (entries(kv, page_size)[~begun] == POISON).all(), "cleared where no page begins"
        assert (entries(kv, page_size)[:, :, 4:] == POISON).all()


@shapes
@dtypes
@pytest.mark.parametrize("tokens, offset", [(3, 0), (200, 0), (7, 130), (2, 700), (900, 77)])
@pytest.mark.parametrize("budget", [(5, 5, 5), (9, 3, 17), (300, 6, 599)])
def test_list_pages_matches_twin(shape, dtype, tokens, offset, budget):
    kv_heads, group, head_dim, page_size = shape
    case = case_of(shape, [offset + tokens], dtype=dtype, layers=2)
    chunk = QueryBlocks(0, 0, tokens, offset)
    pages = chunk.num_pages(page_size)
    # Whole numbers add up to the same in any order, and without ties lists are equal.
    mass = torch.randperm(kv_heads * group * 3 * pages).view(kv_heads * group, 3, pages).float().to(DEVICE)
    held = mass.view(kv_heads, -1, pages).sum(1)
    mass[::group, 0] += (held.argsort(-1).argsort(-1) - held % pages) % pages / pages
    expected, actual = case.kv.clone(), case.kv.clone()
    args = (case.block_table[0], chunk, page_size, 1, 20, *budget)
    reference.list_pages(mass, expected, *args)
    launchers.list_pages(mass, actual, *args)
    last = case.block_table[0, pages - 1].item()
    mine, twin = (entries(kv, page_size)[last] for kv in (actual, expected))
    others = [block for block in range(len(case.kv)) if block != last]
    assert torch.equal(actual[others].nan_to_num(1.0), case.kv[others].nan_to_num(1.0)), "another page was written"
    assert torch.equal(actual[last, :, :page_size].nan_to_num(1.0), case.kv[last, :, :page_size].nan_to_num(1.0))
    count = min(list_capacity(head_dim, dtype.itemsize), pages - min(1, pages))
    assert (mine[:, 0] == pages - 1).all() and (mine[:, 1] == count).all()
    assert torch.equal(mine[:, :2], twin[:, :2])
    assert mine[:, 2].sum() == twin[:, 2].sum() == kv_heads * budget[0]
    assert (mine[:, 2] >= budget[1]).all() and (mine[:, 2] <= budget[2]).all()
    if budget[0] < count:
        assert torch.equal(mine[:, 2], twin[:, 2])
    listed = slice(FROZEN_HEADER, FROZEN_HEADER + count)
    held = mass.view(kv_heads, -1, pages).sum(1)
    rank = held[:, None].expand(-1, 2, -1).gather(2, torch.stack([mine[:, listed], twin[:, listed]], 1).long())
    assert torch.equal(rank[:, 0], rank[:, 1]), "not the largest masses"
    if count:
        assert (mine[:, FROZEN_HEADER] == pages - 1).all(), "the newest page comes first"
        assert all(len(set(row)) == count for row in mine[:, listed].tolist())
        assert 0 not in mine[:, listed], "a sink is listed"


def test_heads_share_out_their_budgets_by_mass():
    case = case_of((3, 1, 64, 16), [1600])
    mass = torch.zeros(3, 1, 100, device=DEVICE)
    mass[0, 0, 10:30] = torch.linspace(5, 4, 20, device=DEVICE)
    mass[1, 0, 40:48] = 3
    mass[2, 0, 50] = 10
    list_pages(case, 0, 1600, mass, (11, 4, 19))
    entry = entries(case.kv, 16)[case.block_table[0, 99].long()]
    # Two pages of the window each, then 17 + 8 + 1 pages of mass, of which the largest: those of head 0.
    assert entry[:, 2].tolist() == [19, 10, 4]
    assert entry[0, FROZEN_HEADER : FROZEN_HEADER + 12].tolist() == [99, 98, *range(10, 20)]
    assert entry[2, FROZEN_HEADER : FROZEN_HEADER + 3].tolist() == [99, 98, 50]


@shapes
@pytest.mark.parametrize("tokens, offset", [(150, 333), (20, 700), (2, 500), (64, 0)])
def test_lists_hold_what_the_last_queries_attend_to(shape, tokens, offset):
    """Against attention from its definition; kernels of the probe included."""
    kv_heads, group, head_dim, page_size = shape
    end = offset + tokens
    case = make_chunk(offset, tokens, kv_heads, group, head_dim, page_size, seed=3)
    room = torch.full((*case.kv.shape[:2], page_size + 1, 2 * head_dim), float("nan"), device=DEVICE)
    room[:, :, :page_size] = case.kv[:, :, :page_size]
    case.kv = room
    start = max(offset, -(-end // min(page_size, 64)) * min(page_size, 64) - 64)
    keys = case.kv[case.block_table.long(), :, :page_size, :head_dim].transpose(0, 1).flatten(1, 2)[:, :end]
    query = case.q[start - offset :].unflatten(1, (kv_heads, group))
    logits = torch.einsum("qhgd,hkd->hgqk", query, keys) * case.scale
    behind = torch.arange(start, end, device=DEVICE)[:, None] - torch.arange(end, device=DEVICE)
    weights = logits.masked_fill(behind < 0, float("-inf")).softmax(-1).sum((1, 2))
    pages = case.num_pages
    held = torch.nn.functional.pad(weights, (0, pages * page_size - end)).unflatten(-1, (pages, -1)).sum(-1)
    free = slice(1, max(1, (end - 20) // page_size))
    for run in (reference, launchers):
        freeze = freeze_of(case, kv_heads, 6)
        mass = freeze.buffers.masses(case.blocks)
        args = (case.kv, case.block_table, case.blocks, page_size)
        run.probe_mass(case.q, *args, case.scale, freeze.buffers.part_lse, freeze.buffers.parts, mass)
        assert error(mass.view(kv_heads, -1, pages).sum(1), held) < 1e-4
        run.list_pages(mass, *args, 1, 20, 5, 5, 5)
        entry = entries(case.kv, page_size)[case.block_table[pages - 1].long()]
        window = list(range(pages - 1, free.stop - 1, -1))
        for head in range(kv_heads):
            count = entry[head, 1]
            listed = entry[head, FROZEN_HEADER : FROZEN_HEADER + count].tolist()
            assert listed[: len(window)] == [page for page in window if page >= 1]
            best = held[head, free].sort(descending=True).values
            got = held[head, listed[len(window) :]]
            assert error(got, best[: len(got)]) < 1e-4 if len(got) else not len(best)


def test_a_context_too_short_to_probe_lists_its_pages_all_the_same():
    case = case_of((2, 3, 64, 16), [40])
    freeze = freeze_of(case, 2, 6, shares=True)
    freeze.list_pages(torch.randn(40, 6, 64, device=DEVICE), case.kv, case.block_table, QueryBlocks(0, 0, 40, 0))
    entry = entries(case.kv, 16)[case.block_table[0, 2].long()]
    assert entry[:, : FROZEN_HEADER + 2].tolist() == [[2, 2, 5, 2, 1]] * 2


def scored(case: Case, run, stop: bool) -> tuple[torch.Tensor, ...]:
    kv = case.kv.clone()
    case.scores.values.fill_(float("nan"))
    case.scores.chunk_lse.fill_(float("nan"))
    run.frozen_score(kv, case.block_table, case.plan, case.page_size, case.scores, stop)
    return case.scores.values.clone(), case.scores.chunk_lse.clone(), entries(kv, case.page_size)


@shapes
@dtypes
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("min_context_tokens", [0, 500])
def test_frozen_score_matches_twin(shape, dtype, stop, min_context_tokens):
    page_size = shape[3]
    # Of both kinds: rows that begin a page and rows within one.
    lengths = [
        1,
        0,
        page_size,
        page_size + 1,
        333,
        20 * page_size + 1,
        90 * page_size,
        70 * page_size + 1,
        1301,
        641,
    ]
    case = case_of(shape, lengths, dtype=dtype, layers=2, min_context_tokens=min_context_tokens, seed=6)
    reference.plan_decode(
        case.seq_lens, case.plan, case.table, page_size, 4, min_context_tokens, case.scores.capacity_pages, True,
        1, 20,
    )  # fmt: skip
    for request, tokens in [(2, 3), (3, page_size), (4, 300), (5, 11 * page_size), (7, 65 * page_size), (8, 1290)]:
        list_pages(case, request, tokens, budget=(8, 6, 15))
    list_pages(case, 5, 77)  # an earlier chunk's
    headers = case.kv.view(torch.int16)[:, :, page_size, 0]
    for request, anchor in [(5, 10), (8, (1290 - 1) // page_size)]:  # carried on, one head of a request not
        blocks = case.block_table[request, anchor + 1 : -(-lengths[request] // page_size) - 1].long()
        headers[blocks, -1] = anchor
    headers[case.block_table[7, 69].long()] = 44  # a page that has no list
    expected, actual = scored(case, reference, stop), scored(case, launchers, stop)
    for mine, twin in zip(actual, expected, strict=True):
        assert torch.equal(mine.isnan(), twin.isnan())
    assert (actual[0] - expected[0]).nan_to_num(0).abs().max() < 1e-6
    assert (actual[1] - expected[1]).nan_to_num(0).abs().max() < 1e-4
    assert torch.equal(actual[2], expected[2]), "headers"
    last = case.block_table[5, 20].long()
    assert (actual[2][last, :, 0] == 10).all(), "not carried on"
    assert (actual[2][case.block_table[7, 70].long(), :, 0] == 64).all(), "not sought"


def choose(case: Case, policy: str, budget_pages: int) -> list[list[list[int]]]:
    """Chosen pages by request and KV head."""
    run, chooser = kernels.for_device(DEVICE), get_decode_policy(policy)
    largest = int(budget_pages * chooser.largest_share)
    case.table.units = torch.full(
        (len(case.seq_lens) * case.kv_heads, largest), -1, dtype=torch.int32, device=DEVICE
    )
    reference.plan_decode(
        case.seq_lens, case.plan, case.table, case.page_size, budget_pages, 0, case.scores.capacity_pages, False,
        1, 20, largest,
    )  # fmt: skip
    chooser.score(case.q, case.kv, case.block_table, case.plan, case.page_size, case.scale, case.scores)
    run.select_pages(
        case.scores, case.block_table, case.plan, case.kv, case.page_size, largest, 1, 20, case.table,
        chooser.coverage or 0.0,
    )  # fmt: skip
    chosen = []
    for request in range(len(case.seq_lens)):
        blocks = case.block_table[request].tolist()
        rows = range(request * case.kv_heads, (request + 1) * case.kv_heads)
        units = [case.table.units[row, : -(-int(case.table.lengths[row]) // case.page_size)] for row in rows]
        named = [UnitGrid.of(case.kv).split(row)[0] for row in units]
        chosen.append([[blocks.index(block) for block in row.tolist()] for row in named])
    return chosen


def decode_to(case: Case, seq_len: int) -> None:
    """One token more in the cache of the only request."""
    case.seq_lens.fill_(seq_len)
    slot = case.block_table[0, (seq_len - 1) // 16].long() * 16 + (seq_len - 1) % 16
    key = torch.randn(1, case.kv_heads, case.kv.shape[3] // 2, device=DEVICE)
    kernels.for_device(DEVICE).page_write(key, key, case.kv, slot[None], 16, FROZEN)


@pytest.mark.parametrize("policy", ["snapkv", "ada_snapkv"])
def test_a_choice_stays_while_pages_are_added(policy):
    case = case_of((2, 3, 64, 16), [1700], seed=1)
    mass = torch.rand(2, 1, 75, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mass[0] *= 3
    budget = (12, 6, 25) if policy == "ada_snapkv" else (12, 12, 12)
    list_pages(case, 0, 1200, mass, budget)
    pages_of_head = entries(case.kv, 16)[case.block_table[0, 74].long()][:, 2].tolist()
    assert (pages_of_head[0] > 12) == (policy == "ada_snapkv") and sum(pages_of_head) == 24
    best = mass[:, 0, :73].clone()
    best[:, 0] = -1
    order = best.argsort(-1, descending=True).tolist()
    before = None
    for seq_len in range(1201, 1700):
        decode_to(case, seq_len)
        case.q.normal_()
        (chosen,) = choose(case, policy, 13)
        new = (seq_len - 1) // 16 - 74
        for head, pages in enumerate(chosen):
            budget = pages_of_head[head]
            recent = min(new, budget // 2)
            newest = list(range(74 + new, 74 + new - recent, -1))
            frozen = [74, 73, *order[head]][: budget - recent]
            assert set(pages) == {0, *newest, *frozen}, (seq_len, head)
        if before is not None and new == before[0]:
            assert chosen == before[1], "chosen anew within a page"
        before = (new, chosen)
    assert new > 20


def test_a_list_of_a_former_owner_is_not_taken():
    case = case_of((2, 3, 64, 16), [1600], seed=1)
    list_pages(case, 0, 1600)
    slots = (case.block_table[0, :90].long()[:, None] * 16 + torch.arange(16, device=DEVICE)).flatten()
    # The page with the list comes first in the next request, and page 95 of the former one is its last.
    blocks = case.block_table[0].clone()
    blocks[[0, 99]] = blocks[[99, 0]]
    case.block_table[0] = blocks
    for start in range(0, 1601, 400):
        slots = torch.arange(start, min(start + 400, 1600), device=DEVICE)
        slots = blocks[slots // 16].long() * 16 + slots % 16
        key = torch.randn(len(slots), 2, 64, device=DEVICE)
        kernels.for_device(DEVICE).page_write(key, key, case.kv, slots, 16, FROZEN)
    assert (entries(case.kv, 16)[blocks[:100].long(), :, 0] == NO_LIST).all()
    assert choose(case, "snapkv", 6) == [[[0, 95, 96, 97, 98, 99]] * 2], "without a list the newest pages"


def test_requests_that_share_pages_share_a_list_and_nothing_else():
    """Two requests of one prefix whose last page is whole; a third goes on from there with a list of its own."""
    case = case_of((2, 3, 64, 16), [1617, 1617, 1700], seed=1)
    case.block_table[1:, :100] = case.block_table[:1, :100]
    list_pages(case, 0, 1600)
    list_pages(case, 2, 1690)
    first, second, third = choose(case, "snapkv", 8)
    assert first == second != third
    again = choose(case, "snapkv", 8)
    assert again == [first, second, third]


def test_what_a_list_cannot_hold_is_refused():
    default = SparseConfig(decode_policy="snapkv")
    check(default, 16, 64, 2, 1 << 20)
    check(SparseConfig(decode_policy="ada_snapkv"), 16, 64, 2, 65536 * 16)
    with pytest.raises(
        ConfigError, match=r"sparse\.budget_tokens: 129 pages .* lists 125 pages .* up to 2048 tokens"
    ):
        check(SparseConfig(decode_policy="snapkv", budget_tokens=2064), 16, 64, 2, 4096)
    check(SparseConfig(decode_policy="snapkv", budget_tokens=4096), 16, 128, 2, 4096)
    with pytest.raises(ConfigError, match=r"sparse\.decode_policy: 'snapkv' counts pages in 16 bits"):
        check(default, 16, 64, 2, 65536 * 16 + 1)
    for policy in ("snapkv", "ada_snapkv"):
        with pytest.raises(ConfigError, match=rf"sparse\.decode_policy: '{policy}' .* with sparse\.offload"):
            SparseConfig.from_mapping({"decode_policy": policy, "offload": {"host_gib": 1}}, "test")
    with pytest.raises(ConfigError, match=r"sparse\.head_budgets: .* with decode_policy='ada_snapkv'"):
        SparseConfig(decode_policy="ada_snapkv", head_budgets="auto")
    assert {name for name, policy in DECODE_POLICIES.items() if policy.summary == FROZEN} == {
        "snapkv",
        "ada_snapkv",
    }

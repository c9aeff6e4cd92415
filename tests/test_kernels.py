"""Every Triton kernel against its plain-torch reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import (
    DEVICE,
    DTYPES,
    ON_GPU,
    TOLERANCE,
    error,
    in_float64,
    make,
    poisoned_scores,
    random_scores,
    select_reference,
    set_scores,
)

from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.pages.decode_plan import COUNTERS, MAX_CANDIDATES, DecodePlan, segment_pages
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers, select_pages

# (kv_heads, group, head_dim, page_size): group 1/3/4/7/8, odd head sizes, every page size.
SHAPES = [(2, 3, 64, 16), (1, 1, 128, 16), (3, 4, 96, 32), (1, 7, 256, 16), (1, 2, 512, 16), (2, 8, 32, 64)]
LENGTHS = [1, 0, 15, 16, 17, 33, 200, 389]


@pytest.mark.parametrize("name", launchers.__all__)
def test_launcher_and_reference_take_the_same_arguments(name):
    """Kernels of either kind are called alike, and what travels together is one object: at most 8 arguments."""
    launcher, plain = getattr(launchers, name), getattr(reference, name)
    assert launcher.__module__.rpartition(".")[2] == plain.__module__.rpartition(".")[2], "files of one name"
    parameters = inspect.signature(launcher).parameters.values()
    others = inspect.signature(plain).parameters.values()
    assert [(p.name, p.default, p.annotation) for p in parameters] == [
        (p.name, p.default, p.annotation) for p in others
    ]
    assert len(parameters) <= 8


def shape_id(shape):
    return "kv{}_group{}_d{}_page{}".format(*shape)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def case_of(shape, dtype=torch.float32, lengths=None, budget_pages=4, **kwargs):
    kv_heads, group, head_dim, page_size = shape
    return make(lengths or LENGTHS, kv_heads, group, head_dim, page_size, budget_pages, dtype=dtype, **kwargs)


@shapes
@dtypes
@pytest.mark.parametrize("summary", ["key_range", "none"])
def test_page_write_matches_reference_over_chunks(shape, dtype, summary):
    kv_heads, _, head_dim, page_size = shape
    expected = torch.full((9, kv_heads, page_size + 1, 2 * head_dim), float("nan"), dtype=dtype, device=DEVICE)
    actual = expected.clone()
    # Two requests written in chunks that start and end inside pages, with padding between them.
    blocks = {"a": torch.tensor([7, 2, 5]), "b": torch.tensor([3, 8])}
    written = {"a": 0, "b": 0}
    for chunk_a, chunk_b in [(1, 2 * page_size), (page_size - 1, 0), (page_size + 3, 1 - page_size), (2, 0)]:
        slots = []
        for name, chunk in (("a", chunk_a), ("b", chunk_b)):
            start = written[name] + min(chunk, 0)  # a negative chunk rewrites: a rejected draft
            positions = torch.arange(start, start + abs(chunk))
            slots += [blocks[name][positions // page_size] * page_size + positions % page_size, torch.tensor([-1])]
            written[name] = start + abs(chunk)
        slots = torch.cat(slots).to(DEVICE)
        key, value = torch.randn(2, len(slots) + 2, kv_heads, head_dim, device=DEVICE).to(dtype)
        for write, kv in ((reference.page_write, expected), (launchers.page_write, actual)):
            write(key, value, kv, slots, page_size, summary)
    rows = slice(0, page_size)
    assert torch.equal(actual[:, :, rows].nan_to_num(123.0), expected[:, :, rows].nan_to_num(123.0))
    if summary == "none":
        assert actual[7, :, page_size].isnan().all() and expected[7, :, page_size].isnan().all()
    else:
        assert actual[5, :, page_size].isnan().all(), "a page that is not full was summarised"
        mine, right = (reference.key_range(kv[[7, 2, 3, 8]], page_size) for kv in (actual, expected))
        # Division and rounding of the two may differ by one step of 127.
        assert all((a - b).abs().max() <= b.abs().max() / 100 for a, b in zip(mine, right, strict=True))
        assert error(mine[0], right[0]) < 1e-3 and error(mine[1], right[1]) < 1e-3
    assert expected[1].isnan().all(), "a block that no slot names was written"


def test_a_key_range_is_no_wider_than_it_must_be():
    key = torch.randn(16, 1, 64, device=DEVICE)
    kv = torch.full((2, 1, 17, 128), float("nan"), device=DEVICE)
    launchers.page_write(key, key, kv, torch.arange(16, 32, device=DEVICE), 16, "key_range")
    centre, half_width = (x[0, 0] for x in reference.key_range(kv[1:], 16))
    low, high = key[:, 0].amin(0), key[:, 0].amax(0)
    assert (centre - half_width <= low).all() and (centre + half_width >= high).all()
    # Not much wider than it must be: half a step of the centre and one of the width, twice that where
    # channels carry scales.
    slack = half_width - (high - low) / 2
    step, carries = (low + high).abs().max() / 500 + half_width.max() / 120, torch.arange(64, device=DEVICE) < 16
    assert (slack <= torch.where(carries, 2, 1) * step).all()


@dtypes
@pytest.mark.parametrize("keys", ["outlier", "zero", "tiny", "constant"])
def test_key_range_holds_every_key(dtype, keys):
    """Channels of very different size share a scale; no key may fall out of its page's range."""
    key = torch.randn(16, 2, 64, device=DEVICE)
    if keys == "outlier":
        key[:, :, 5] = 60 + 0.1 * key[:, :, 5]
        key[:, :, 7] *= 30
    elif keys == "constant":
        key = key[:1].expand(16, -1, -1)
    else:
        key = key * (0.0 if keys == "zero" else 1e-6)
    key = key.to(dtype).contiguous()
    for write in (reference.page_write, launchers.page_write):
        kv = torch.full((1, 2, 17, 128), float("nan"), dtype=dtype, device=DEVICE)
        write(key, key, kv, torch.arange(16, device=DEVICE), 16, "key_range")
        centre, half_width = (x[0] for x in reference.key_range(kv, 16))
        stored = kv[0, :, :16, :64].float()
        assert ((stored - centre[:, None]).abs() <= half_width[:, None] * (1 + 1e-5)).all()


@pytest.mark.parametrize("short_rows_dense", [False, True])
@pytest.mark.parametrize("capacity", [10**6, 30, 5])
@pytest.mark.parametrize("largest", [None, 8])
def test_plan_decode_matches_reference(short_rows_dense, capacity, largest):
    seq_lens = torch.tensor([0, 1, 64, 65, 96, 97, 400, 0, 129, 5000], dtype=torch.int32, device=DEVICE)
    expected, actual = DecodePlan.empty(10, DEVICE, 16), DecodePlan.empty(10, DEVICE, 16)
    tables = [PageTable.empty(10, 3, 8, DEVICE) for _ in range(2)]
    for plan, table, run in (
        (expected, tables[0], reference.plan_decode),
        (actual, tables[1], launchers.plan_decode),
    ):
        table.lengths.fill_(-1)
        for _ in range(2):
            selection = Selection(16, 4, 1, 20, largest_pages=largest)
            run(seq_lens, plan, table, selection, 96, capacity, short_rows_dense)
    for name in ("table_seq_lens", "dense_seq_lens", "score_offsets", "totals", "counters"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(tables[0].lengths, tables[1].lengths)
    in_table = int(expected.totals[1])
    assert torch.equal(actual.work[:in_table], expected.work[:in_table])
    assert torch.equal(actual.work[:, 3:], expected.work[:, 3:])
    assert sorted(actual.work[:in_table, 0].tolist()) == actual.table_seq_lens.nonzero().squeeze(1).tolist()
    total = actual.table_seq_lens + actual.dense_seq_lens
    assert torch.equal(total, seq_lens), "a row was lost or is attended twice"
    assert (actual.score_offsets[5] >= 0) == (capacity > 5 and largest is None), "7 pages"
    counted = dict(zip(COUNTERS, actual.counters.tolist(), strict=True))
    wanted = [97, 400, 129, 5000] if largest is None else [400, 129, 5000]
    assert (counted["rows"], counted["short_rows"]) == (2 * 8, 2 * 4), "of 1 to 96 tokens"
    assert counted["covered_rows"] == 2 * (4 - len(wanted)), "pages of 97 tokens fit the largest budget"
    assert counted["sparse_rows"] == 2 * int(actual.totals[0]) <= 2 * len(wanted)
    assert (counted["steps"], counted["sparse_steps"]) == (2, 2 * (counted["sparse_rows"] > 0))


@shapes
@dtypes
@pytest.mark.parametrize("name", ["range_score", "page_mass"])
def test_scores_match_reference(shape, dtype, name):
    case = case_of(shape, dtype, lengths=[*LENGTHS, 130 * shape[3]])
    actual = poisoned_like(case)
    for run, scores in ((getattr(reference, name), case.scores), (getattr(launchers, name), actual)):
        run(case.q, case.kv, case.block_table, case.plan, case.geometry, scores)
    for mine, expected in ((actual.values, case.scores.values), (actual.chunk_lse, case.scores.chunk_lse)):
        assert torch.equal(mine.isnan(), expected.isnan()), "wrote a score that nobody asked for"
        assert torch.equal(mine.isneginf(), expected.isneginf()), "a page that is not full has no range"
        written = mine.isfinite()
        assert written.any()
        assert error(mine[written], expected[written]) < TOLERANCE[torch.float32]


@dtypes
def test_quest_score_slack_matches_reference(dtype):
    case = case_of(SHAPES[0], dtype)
    actual = poisoned_like(case)
    for run, scores in ((reference.range_score, case.scores), (launchers.range_score, actual)):
        run(case.q, case.kv, case.block_table, case.plan, case.geometry, scores, 0.5)
    written = case.scores.values.isfinite()
    # The kernel rounds three quarters of a query to its dtype.
    assert error(actual.values[written], case.scores.values[written]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["recency_score", "random_score"])
def test_index_scores_match_reference(name):
    case = make([*LENGTHS, 2111])
    actual = poisoned_like(case)
    for run, scores in ((getattr(reference, name), case.scores), (getattr(launchers, name), actual)):
        run(case.block_table, case.plan, case.page_size, scores)
    assert torch.equal(actual.values.nan_to_num(-9.0), case.scores.values.nan_to_num(-9.0))
    written = ~case.scores.chunk_lse.isnan()
    assert error(actual.chunk_lse[written], case.scores.chunk_lse[written]) < TOLERANCE[torch.float32]


def poisoned_like(case):
    q_heads, capacity = case.scores.values.shape
    return poisoned_scores(q_heads, capacity, len(case.seq_lens), DEVICE)


def test_quest_score_bounds_every_logit():
    case = make([300], budget_pages=4)
    launchers.range_score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    blocks = case.block_table[0, :18].long()  # the last page is not full
    keys = case.kv[blocks, :, :16, :64].double()
    logits = torch.einsum("hgd,phtd->hgpt", case.q[0].view(2, 3, 64).double(), keys) * case.scale
    best = logits.amax(-1).flatten(0, 1)
    assert (case.scores.values[:, :18] >= best - 1e-4).all()


@shapes
@pytest.mark.parametrize("segment, small", [(2048, 1024), (256, 16), (16, 16)],
                         ids=["small", "one_segment", "merged_segments"])  # fmt: skip
@pytest.mark.parametrize("scores", ["random", "ties", "underflow"])
def test_select_pages_matches_reference(shape, segment, small, scores, monkeypatch):
    monkeypatch.setattr(select_pages, "SMALL_PAGES", small)
    case = case_of(shape, lengths=[*LENGTHS, 2111], segment_pages=segment)
    values = torch.randn_like(case.scores.values)
    if scores == "ties":
        values = values[0].sign().expand_as(values)  # equal masses, but for the last bit of an exponential
    elif scores == "underflow":
        values = values.round() * 1000.0  # most masses are exactly 0: ties again, of the lowest kind
    set_scores(case, values)
    select_reference(case)
    head_pages, lengths = case.table.head_pages.clone(), case.table.lengths.clone()
    # Twice: arrivals must be back at zero.
    for _ in range(2):
        case.table.head_pages.fill_(2**30)
        launchers.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    assert not case.scores.arrivals.any()
    differing = []
    for row, length in enumerate(lengths.tolist()):
        pages = -(-length // case.page_size)
        mine, expected = case.table.head_pages[row, :pages], head_pages[row, :pages]
        if torch.equal(mine, expected):
            continue
        # Masses are sums of exponentials: rounding may swap pages, but only of nearly equal mass.
        differing.append(row)
        swapped = [pages_of(case, row, ids) for ids in (mine, expected)]
        assert all(a < b for a, b in zip(swapped[0], swapped[0][1:], strict=False)), "not ascending"
        only = [sorted(set(a) - set(b)) for a, b in (swapped, swapped[::-1])]
        mass = page_masses(case, row)
        assert torch.allclose(mass[only[0]].sort().values, mass[only[1]].sort().values, rtol=1e-3)
    # An array's last elements may take another exponential than those before them; most rows must be in order.
    assert scores != "ties" or len(differing) <= 2, f"rows {differing}"


def test_rows_of_any_length_are_ranked_as_by_the_reference():
    """At the usual sizes: a small program, one segment, one program for two segments, and a merge."""
    lengths = [16 * pages + 5 for pages in (1020, 1027, 2050, 2054, 4097, 4102)]
    case = make(lengths, kv_heads=1, group=2, head_dim=16, budget_pages=128)
    random_scores(case)
    select_reference(case)
    expected = case.table.head_pages.clone()
    case.table.head_pages.fill_(2**30)
    launchers.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    # Rounding may swap pages of nearly equal mass, in few places.
    assert (case.table.head_pages != expected).float().mean() < 0.02
    assert (case.table.head_pages < 2**30).all()


@pytest.mark.parametrize("segment, small", [(256, 256), (256, 16), (32, 16)],
                         ids=["small", "one_segment", "merged_segments"])  # fmt: skip
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_rows_that_stop_at_top_p_match_reference(segment, small, top_p, monkeypatch):
    monkeypatch.setattr(select_pages, "SMALL_PAGES", small)
    case = make([*LENGTHS, 1500, 2111], 2, 3, 64, 16, 30, segment_pages=segment)
    set_scores(case, 2 * torch.randn_like(case.scores.values))
    args = (case.scores, case.block_table, case.plan, case.kv, case.selection(top_p=top_p), case.table)
    found = []
    for run in (reference.select_pages, launchers.select_pages):
        case.table.head_pages.fill_(2**30)
        run(*args)
        found.append((case.table.head_pages.clone(), case.table.lengths.clone()))
    (head_pages, lengths), (expected_pages, expected_lengths) = found
    assert torch.equal(lengths, expected_lengths)
    shortened = 0
    for row, length in enumerate(lengths.tolist()):
        pages = -(-length // 16)
        assert torch.equal(head_pages[row, :pages], expected_pages[row, :pages])
        if case.plan.score_offsets[row // 2] >= 0 and top_p < 1:
            mass = page_masses(case, row)
            held = mass[pages_of(case, row, head_pages[row, :pages])].sum().item() / 3
            assert held >= top_p - 1e-5 or pages == 30, "stopped short of the top_p"
            shortened += pages < 30
    assert shortened or top_p > 0.3


@pytest.mark.parametrize("segment, small", [(256, 256), (256, 16), (32, 16)],
                         ids=["small", "one_segment", "merged_segments"])  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 3, 64, 16), (5, 1, 32, 16), (2, 7, 64, 32)], ids=shape_id)
def test_heads_with_budgets_of_their_own_match_reference(shape, segment, small, monkeypatch):
    monkeypatch.setattr(select_pages, "SMALL_PAGES", small)
    case = case_of(shape, lengths=[*LENGTHS, 1500, 2111], segment_pages=segment, budget_pages=30)
    page, kv_heads = case.page_size, case.kv_heads
    random_scores(case)
    asked = [4, 30, 11, 5, 17][:kv_heads]
    head_budget_pages = torch.tensor(asked, dtype=torch.int32, device=DEVICE)
    selection = case.selection(head_budget_pages=head_budget_pages)
    args = (case.scores, case.block_table, case.plan, case.kv, selection, case.table)
    found = []
    for run in (reference.select_pages, launchers.select_pages, launchers.select_pages):
        # What an earlier layer left in rows that are chosen; the others are the plan's.
        scored = (case.plan.score_offsets >= 0).repeat_interleave(kv_heads)
        case.table.lengths[scored] = -1
        case.table.head_pages.fill_(2**30)
        run(*args)
        found.append((case.table.head_pages.clone(), case.table.lengths.clone()))
    assert not case.scores.arrivals.any() and int(case.plan.totals[0]) >= 2
    (expected_pages, expected_lengths), *mine = found
    for head_pages, lengths in mine:
        assert torch.equal(lengths, expected_lengths)
        for row, length in enumerate(lengths.tolist()):
            request, head = divmod(row, kv_heads)
            seq_len, pages = int(case.seq_lens[request]), -(-length // page)
            all_pages = -(-seq_len // page)
            assert pages == (min(all_pages, asked[head]) if all_pages > 30 else all_pages)
            assert length == seq_len - (all_pages - pages) * page
            assert torch.equal(head_pages[row, :pages], expected_pages[row, :pages])


def test_equal_budgets_of_heads_choose_what_one_budget_chooses():
    case = make([1500, 33, 2111], budget_pages=30)
    random_scores(case)
    args = (case.scores, case.block_table, case.plan, case.kv)
    alike = torch.full((2,), 30, dtype=torch.int32, device=DEVICE)
    for run in (reference.select_pages, launchers.select_pages):
        run(*args, case.selection(), case.table)
        head_pages, lengths = case.table.head_pages.clone(), case.table.lengths.clone()
        case.table.head_pages.fill_(2**30)
        run(*args, case.selection(head_budget_pages=alike), case.table)
        assert torch.equal(case.table.lengths, lengths)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(case.table.head_pages[row, : -(-length // 16)], head_pages[row, : -(-length // 16)])


@pytest.mark.parametrize("tokens, budget, expected", [(128 << 10, 128, 2048), (1 << 20, 128, 4096),
                                                      (4 << 20, 512, 4096), (4 << 20, 1024, 8192)])  # fmt: skip
def test_segments_are_few_and_a_merge_holds_a_budget_of_each(tokens, budget, expected):
    pages = tokens // 16
    assert segment_pages(pages, budget) == expected
    assert -(-pages // expected) * budget <= MAX_CANDIDATES


def test_a_budget_that_no_merge_holds_is_refused():
    with pytest.raises(
        ConfigError, match=r"budget_tokens: 40000 pages .* of 40001 pages; allowed: a smaller budget"
    ):
        segment_pages(40001, 40000)


def test_selection_takes_a_budget_larger_than_any_context():
    case = make([200, 33], budget_pages=10**5)
    assert (case.plan.score_offsets < 0).all()
    launchers.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    assert (
        case.table.head_pages[0, :13] == HeadPageGrid.of(case.kv).head_pages(case.block_table[0, :13], 0)
    ).all()


def pages_of(case, row, head_pages):
    """Positions in the context of the pages that ``head_pages`` of a table row name."""
    blocks = case.block_table[row // case.kv_heads].tolist()
    return [blocks.index(block) for block in HeadPageGrid.of(case.kv).split(head_pages)[0].tolist()]


def page_masses(case, row):
    """float64 masses of all pages of a table row's request and KV head."""
    request, head = divmod(row, case.kv_heads)
    group = case.scores.q_heads // case.kv_heads
    offset, length = int(case.plan.score_offsets[request]), int(case.seq_lens[request])
    span = slice(offset, offset + -(-length // case.page_size))
    return case.scores.values[head * group : (head + 1) * group, span].double().softmax(-1).sum(0)


@shapes
@dtypes
def test_sparse_decode_matches_float64(shape, dtype):
    case = case_of(shape, dtype)
    random_scores(case)
    select_reference(case)
    exact = torch.zeros_like(case.q, dtype=torch.float64)
    reference.sparse_decode(case.q.double(), in_float64(case.kv), case.table, case.geometry, exact)
    out = torch.full_like(case.q, float("nan"))
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, out)
    attended = case.plan.table_seq_lens > 0
    assert error(out[attended], exact[attended]) < TOLERANCE[dtype]
    assert out[~attended].isnan().all(), "a row that is not of the table was written"


@dtypes
def test_sparse_decode_adds_the_parts_of_many_programs(dtype):
    """Long rows beside a short one, whose later programs have nothing, twice: counters must reset."""
    case = make([1500, 33, 0, 701], 2, 3, 64, 16, budget_pages=40, min_context_tokens=640, dtype=dtype)
    random_scores(case)
    select_reference(case)
    exact = torch.zeros_like(case.q, dtype=torch.float64)
    reference.sparse_decode(case.q.double(), in_float64(case.kv), case.table, case.geometry, exact)
    for _ in range(2):
        out = torch.full_like(case.q, float("nan"))
        launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, out)
        assert error(out[[0, 1, 3]], exact[[0, 1, 3]]) < TOLERANCE[dtype]
        assert out[2].isnan().all()


@pytest.mark.parametrize("layers", [1, 3])
def test_kernels_follow_the_strides_of_a_cache_with_layers_inside_blocks(layers):
    case = make([200, 70], layers=layers)
    out, expected = torch.full_like(case.q, float("nan")), torch.full_like(case.q, float("nan"))
    launchers.range_score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    select_reference(case)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, out)
    reference.sparse_decode(case.q, case.kv, case.table, case.geometry, expected)
    assert error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs more memory than a CPU test should take")
def test_offsets_past_int32():
    """A cache of more than 2**31 elements, used at its far end."""
    heads, page, head_dim = 8, 16, 128
    blocks = 2**32 // (heads * (page + 1) * 2 * head_dim)
    kv = torch.empty(blocks, heads, page + 1, 2 * head_dim, dtype=torch.bfloat16, device=DEVICE)
    far = torch.arange(blocks - 40, blocks, device=DEVICE)
    slots = (far[:, None] * page + torch.arange(page, device=DEVICE)).flatten()[:-3]
    key, value = torch.randn(2, len(slots), heads, head_dim, device=DEVICE).bfloat16()
    launchers.page_write(key, value, kv, slots, page, "key_range")
    case = make([len(slots)], heads, 4, head_dim, page, 8, dtype=torch.bfloat16)
    case.kv, case.block_table = kv, far[None].int()
    scores = poisoned_like(case)
    args = (case.block_table, case.plan, case.geometry)
    launchers.range_score(case.q, kv, *args, scores)
    reference.range_score(case.q, kv, *args, case.scores)
    assert error(scores.values[:, :40], case.scores.values[:, :40]) < 1e-5
    out, expected = torch.full_like(case.q, float("nan")), torch.full_like(case.q, float("nan"))
    launchers.select_pages(case.scores, case.block_table, case.plan, kv, case.selection(), case.table)
    launchers.sparse_decode(case.q, kv, case.table, case.geometry, out)
    reference.sparse_decode(case.q, kv, case.table, case.geometry, expected)
    assert error(out, expected) < TOLERANCE[torch.bfloat16]

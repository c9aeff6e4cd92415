"""Budgets that rows of a step ask for: planned, chosen and ended as if the whole engine had them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEVICE, make, random_scores, set_scores

from vllm_sparse.kernels import reference
from vllm_sparse.pages.decode_plan import (
    EVERY_PAGE,
    EXACT,
    MAX_SEGMENT_PAGES,
    WHOLE,
    DecodePlan,
    segment_pages,
    takes_smaller_budgets,
)
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers, select_pages

LENGTHS = [900, 700, 0, 33, 900, 1311, 497, 900]
ASKED = [6, 0, 0, 7, EXACT, 11, 20, 30]
BUDGET = 30


def with_budgets(case, selection, asked=ASKED, run=reference):
    """``case`` planned anew for rows that ask for ``asked``."""
    case.plan.budgets.copy_(torch.tensor(asked))
    run.plan_decode(case.seq_lens, case.plan, case.table, selection, 0, case.scores.capacity_pages, False)
    return case


@pytest.mark.parametrize("short_rows_dense", [False, True])
@pytest.mark.parametrize("largest", [None, 45])
def test_plan_matches_reference(short_rows_dense, largest):
    plans, tables = [], []
    selection = Selection(16, BUDGET, 1, 20, largest_pages=largest)
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    for run in (reference, launchers):
        plan, table = DecodePlan.empty(8, DEVICE, 16), PageTable.empty(8, 3, 45, DEVICE)
        plan.score_offsets.fill_(77)
        table.lengths.fill_(-1)
        plan.budgets.copy_(torch.tensor(ASKED))
        run.plan_decode(seq_lens, plan, table, selection, 0, 10**6, short_rows_dense)
        plans.append(plan)
        tables.append(table)
    for name in ("table_seq_lens", "dense_seq_lens", "score_offsets", "totals", "counters"):
        assert torch.equal(getattr(plans[0], name), getattr(plans[1], name)), name
    assert torch.equal(tables[0].lengths, tables[1].lengths)
    offsets = plans[1].score_offsets.tolist()
    # Of 497 tokens, 32 pages, 20 are chosen: of the largest head's share, 30 of 45, too.
    assert [offset >= 0 for offset in offsets] == [True, largest is None, False, False, False, True, True, True]
    assert offsets[3] == EVERY_PAGE and offsets[4] == WHOLE
    assert int(plans[1].counters[0]) == sum(
        n if offset < 0 else n - (-(-n // 16) - (asked or BUDGET)) * 16
        for n, offset, asked in zip(LENGTHS, offsets, ASKED, strict=True)
    )


@pytest.mark.parametrize("segment, small, shape",
                         [(256, 256, (3, 3, 64, 16)), (256, 16, (2, 7, 64, 32)), (32, 16, (2, 3, 32, 16))],
                         ids=["small", "one_segment", "merged_segments"])  # fmt: skip
@pytest.mark.parametrize("more", ["", "heads", "top_p"])
def test_rows_get_what_they_ask_for(shape, segment, small, more, monkeypatch):
    """Each row is what it is in an engine whose budget is its own; the kernel agrees with the reference."""
    monkeypatch.setattr(select_pages, "SMALL_PAGES", small)
    kv_heads, page = shape[0], shape[3]
    case = make(LENGTHS, *shape, BUDGET, segment_pages=segment)
    heads = [15, 30, 5][:kv_heads]
    settings = {"top_p": 0.6} if more == "top_p" else {}
    if more == "heads":
        settings["head_budget_pages"] = torch.tensor(heads, dtype=torch.int32, device=DEVICE)
    selection = case.selection(**settings)
    found = []
    for run in (reference, launchers, launchers):
        with_budgets(case, selection, run=run)
        if run is reference:
            set_scores(case, 2 * torch.randn_like(case.scores.values))
        case.table.head_pages.fill_(2**30)
        run.select_pages(case.scores, case.block_table, case.plan, case.kv, selection, case.table)
        found.append((case.table.head_pages.clone(), case.table.lengths.clone()))
    assert not case.scores.arrivals.any()
    (expected_pages, expected_lengths), *mine = found
    for head_pages, lengths in mine:
        assert torch.equal(lengths, expected_lengths)
        for row, length in enumerate(lengths.tolist()):
            if ASKED[row // kv_heads] != EXACT:
                pages = -(-length // page)
                assert torch.equal(head_pages[row, :pages], expected_pages[row, :pages])
                assert (head_pages[row, max(pages, 30) :] == 2**30).all(), "a row past its width was written"
    for request, asked in enumerate(ASKED):
        if int(case.plan.score_offsets[request]) < 0:
            continue
        budget, one = asked or BUDGET, {**settings}
        if more == "heads":
            scaled = [
                max(round(pages * budget / BUDGET + 1e-9), min(pages, selection.least_pages)) for pages in heads
            ]
            one["head_budget_pages"] = torch.tensor(scaled, dtype=torch.int32, device=DEVICE)
        alone = with_budgets(case, selection, [0 if row == request else EXACT for row in range(8)])
        # The same scores, wherever they lie in the batch.
        alone.plan.score_offsets[request] = score_offset(LENGTHS, ASKED, request, page)
        own = replace(selection, budget_pages=budget, **one)
        reference.select_pages(case.scores, case.block_table, alone.plan, case.kv, own, case.table)
        rows = slice(request * kv_heads, (request + 1) * kv_heads)
        if not more:
            case.table.lengths[rows] = LENGTHS[request] - (-(-LENGTHS[request] // page) - budget) * page
        assert torch.equal(case.table.lengths[rows], expected_lengths[rows])
        for row in range(rows.start, rows.stop):
            pages = -(-int(expected_lengths[row]) // page)
            assert torch.equal(case.table.head_pages[row, :pages], expected_pages[row, :pages])


def score_offset(lengths, asked, request, page) -> int:
    """First column of a row's scores, behind those of the rows before it that are scored."""
    before = zip(lengths[:request], asked[:request], strict=True)
    pages = ((-(-n // page), budget) for n, budget in before)
    return sum(count for count, budget in pages if budget != EXACT and count > (budget or BUDGET))


def test_an_engine_with_a_budget_of_everything_takes_smaller_ones():
    """It ranks in one segment, as long as the longest context, and merges nothing."""
    pages = 4500
    segment = segment_pages(pages, 10**6)
    assert segment == 8192
    case = make([16 * pages - 3, 800], 1, 2, 16, 16, budget_pages=pages + 2, segment_pages=segment)
    selection = case.selection()
    found = []
    for run in (reference, launchers):
        with_budgets(case, selection, [40, 0])
        if run is reference:
            random_scores(case)
        case.table.head_pages.fill_(2**30)
        run.select_pages(case.scores, case.block_table, case.plan, case.kv, selection, case.table)
        found.append(case.table.head_pages.clone())
    assert case.plan.score_offsets.tolist() == [0, EVERY_PAGE]
    assert (found[1][0, :40] < 2**30).all() and (found[1][:, 50:] == 2**30).all()
    # Rounding may swap pages of nearly equal mass.
    assert (found[0] != found[1]).sum() < 3


def test_contexts_too_long_for_one_segment_take_no_smaller_budgets():
    longest = MAX_SEGMENT_PAGES
    assert takes_smaller_budgets(longest, 10**9) and segment_pages(longest, 10**9) == longest
    assert not takes_smaller_budgets(longest + 1, 10**9) and takes_smaller_budgets(longest + 1, 128)
    assert segment_pages(longest + 1, 10**9) == longest

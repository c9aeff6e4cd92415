"""Rows that attend to their whole context, however long: prompt tokens that come alone, in steps that look like
decode, and rows of requests that want exact attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, TOLERANCE, error, in_float64, make, random_scores

from vllm_sparse.kernels import reference
from vllm_sparse.pages.decode_plan import COUNTERS, EVERY_PAGE, EXACT, PROMPT, WHOLE
from vllm_sparse.pages.selection import Selection

LENGTHS = [1, 400, 0, 385, 16, 230, 47]
ASKED = [EXACT, PROMPT, 0, 0, 0, EXACT, 0]
WHOLE_ROWS = [0, 1, 5]
BUDGET = 6


@pytest.fixture(params=["reference", "kernel"])
def run(request):
    if request.param == "reference":
        return reference
    pytest.importorskip("triton")
    from vllm_sparse.kernels import launchers

    return launchers


def planned(run, dtype=torch.float32, short_rows_dense=False):
    case = make(LENGTHS, 2, 3, 64, 16, BUDGET, dtype=dtype, seed=3)
    case.plan.budgets.copy_(torch.tensor(ASKED))
    case.plan.counters.zero_()
    case.plan.score_offsets.fill_(77)
    run.plan_decode(
        case.seq_lens,
        case.plan,
        case.table,
        Selection(16, BUDGET, 1, 20),
        0,
        case.scores.capacity_pages,
        short_rows_dense,
    )
    random_scores(case)
    case.table.head_pages.fill_(2**30)
    run.select_pages(case.scores, case.block_table, case.plan, case.kv, Selection(16, BUDGET, 1, 20), case.table)
    case.table = replace(case.table, routes=case.plan.score_offsets, block_table=case.block_table)
    return case


def test_whole_rows_are_never_scored_and_prompts_not_counted(run):
    case = planned(run)
    assert (case.plan.score_offsets[WHOLE_ROWS] == WHOLE).all()
    assert case.plan.score_offsets.tolist()[2:5] == [EVERY_PAGE, 0, EVERY_PAGE]
    assert torch.equal(case.plan.table_seq_lens, case.seq_lens)
    assert (case.table.head_pages.view(-1, 2, BUDGET)[WHOLE_ROWS] == 2**30).all(), (
        "a row past its width was written"
    )
    assert case.plan.totals.tolist()[:2] == [1, 6]
    context = 1 + 230 + 385 + 16 + 47
    assert case.plan.counters[:2].tolist() == [context - (25 - BUDGET) * 16, context]
    counted = dict(zip(COUNTERS, case.plan.counters.tolist(), strict=True))
    assert counted["rows"] == 5, "prompt tokens are no decode rows"
    assert (counted["sparse_rows"], counted["covered_rows"], counted["exact_rows"]) == (1, 2, 2)


def test_whole_rows_go_to_the_dense_backend_where_one_runs_beside(run):
    case = planned(run, short_rows_dense=True)
    assert case.plan.dense_seq_lens.tolist() == [1, 400, 0, 0, 16, 230, 47]
    assert case.plan.table_seq_lens.tolist() == [0, 0, 0, 385, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_whole_rows_attend_to_every_page(run, dtype):
    case = planned(run, dtype)
    out = torch.full_like(case.q, 7.0)
    run.sparse_decode(case.q, case.kv, case.table, case.geometry, out)
    starts = torch.arange(len(LENGTHS) + 1, dtype=torch.int32)
    exact = torch.zeros_like(case.q, dtype=torch.float64)
    reference.dense_attention(
        case.q.double(), in_float64(case.kv), case.block_table, starts, case.seq_lens, case.geometry, exact
    )
    assert error(out[WHOLE_ROWS], exact[WHOLE_ROWS]) < TOLERANCE[dtype]
    assert error(out[[4]], exact[[4]]) < TOLERANCE[dtype], "a short row changed"
    assert (out[2] == 7.0).all(), "padding was written"
    assert error(out[[3]], exact[[3]]) > 0.05, "the row of chosen pages attends to all of them"


def test_whole_rows_are_read_on_the_host_in_place(run):
    case = planned(run)
    host = case.kv[:, :, :16].clone(memory_format=torch.contiguous_format)
    hot = torch.full_like(host, float("nan"))
    out, expected = torch.full_like(case.q, 7.0), torch.full_like(case.q, 7.0)
    reference.sparse_decode(case.q, case.kv, case.table, case.geometry, expected)
    case.table.lengths[torch.tensor([4, 6, 7, 12, 13, 8, 9])] = 0  # leave whole rows alone
    run.sparse_decode(case.q, hot, case.table, case.geometry, out, host)
    assert error(out[WHOLE_ROWS], expected[WHOLE_ROWS]) < TOLERANCE[torch.float32]

"""Kernels of decode rows with drafts: several query tokens a request, whose pages are chosen and read together."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, ON_GPU, TOLERANCE, Case, error, in_float64, make, poisoned_scores, random_scores
from test_kernels import shape_id

from vllm_sparse.kernels import reference
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_tokens import ONE, QueryTokens

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers

SHAPES = [(2, 3, 64, 16), (1, 1, 128, 16), (1, 8, 96, 32), (2, 4, 32, 16)]
LENGTHS = [17, 0, 4, 200, 33, 389, 5, 81]
TOKENS = {
    2: [1, 2, 2, 1, 2, 2, 1, 1],
    4: [
        4,
        4,
        4,
        1,
        2,
        3,
        4,
        1,
    ],  # one draft fewer than there is room for, as vLLM batches them; the second is padding
    17: [17, 3, 2, 17, 16, 5, 1, 9],
}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
drafts = pytest.mark.parametrize("most", TOKENS)


def case_of(shape, most, dtype=torch.float32, budget_pages=6, **more) -> Case:
    kv_heads, group, head_dim, page_size = shape
    more = {"query_tokens": TOKENS[most], "most_tokens": most, **more}
    return make(LENGTHS, kv_heads, group, head_dim, page_size, budget_pages, dtype=dtype, **more)


def token_of(case: Case, request: int, token: int) -> torch.Tensor:
    return case.q[int(case.plan.queries.starts[request]) + token]


def scored(case: Case, request: int) -> slice:
    offset = int(case.plan.score_offsets[request])
    return slice(offset, offset + -(-int(case.seq_lens[request]) // case.page_size))


SCORERS = {
    "bound": ("range_score", "key_range", {"slack": 1.0}), "middle": ("range_score", "key_range", {"slack": 0.4}),
    "sketch1": ("sketch_score", "sketch1", {"summary": "sketch1"}),
    "sketch2": ("sketch_score", "sketch2", {"summary": "sketch2"}), "mass": ("page_mass", "none", {}),
}  # fmt: skip


@shapes
@drafts
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_of_every_token_that_is_asked(shape, most, scorer):
    """As of the same kernel for one token a request: a row of scores is that of its token alone."""
    name, summary, settings = SCORERS[scorer]
    case = case_of(shape, most, summary=summary)
    kv_heads, group, asked = case.kv_heads, shape[1], case.plan.queries.asked
    for kernels in (launchers, reference):
        found = poisoned_scores(case.scores.rows, case.scores.capacity_pages, len(LENGTHS), DEVICE)
        args = (case.kv, case.block_table, case.plan, case.geometry)
        getattr(kernels, name)(case.q, *args, found, **settings)
        spans = case.plan.queries.spans(len(LENGTHS))
        for row in range(asked):
            tokens = [case.plan.queries.asked_of(first, max(count, 1))[row] for first, count in spans]
            alone = poisoned_scores(kv_heads * group, case.scores.capacity_pages, len(LENGTHS), DEVICE)
            plan = case.plan.rows(len(LENGTHS), ONE)
            getattr(kernels, name)(
                case.q[tokens], case.kv, case.block_table, plan, case.geometry, alone, **settings
            )
            by_token = found.values.unflatten(0, (kv_heads, asked, group))[:, row].flatten(0, 1)
            by_chunk = found.chunk_lse.unflatten(0, (kv_heads, asked, group))[:, row].flatten(0, 1)
            written = ~alone.values.isnan()
            assert written.any() and torch.equal(written, ~by_token.isnan())
            assert (by_token - alone.values)[written].abs().max() < 1e-4
            assert torch.equal(alone.chunk_lse.isnan(), by_chunk.isnan())
            assert (by_chunk - alone.chunk_lse).nan_to_num(0).abs().max() < 1e-4


def test_tokens_that_are_asked_are_spread_evenly():
    for most, count, expected in [
        (1, 1, [0]), (2, 1, [0, 0]), (2, 2, [0, 1]), (3, 2, [0, 1, 1]), (4, 1, [0, 0, 0, 0]), (4, 2, [0, 0, 1, 1]),
        (4, 3, [0, 1, 1, 2]), (4, 4, [0, 1, 2, 3]), (17, 17, [0, 5, 11, 16]), (17, 2, [0, 0, 1, 1]),
    ]:  # fmt: skip
        assert QueryTokens(most).asked_of(7, count) == [7 + token for token in expected], (most, count)


@shapes
@drafts
@pytest.mark.parametrize("top_p", [0.0, 0.6])
@pytest.mark.parametrize("segment_pages", [16, 4096], ids=["segments", "alone"])
def test_pages_are_chosen_as_by_the_reference(shape, most, top_p, segment_pages):
    case = case_of(shape, most, segment_pages=segment_pages)
    random_scores(case)
    expected = PageTable(case.table.head_pages.clone(), case.table.lengths.clone(), queries=case.table.queries)
    args = (case.scores, case.block_table, case.plan, case.kv, case.selection(top_p=top_p))
    launchers.select_pages(*args, case.table)
    reference.select_pages(*args, expected)
    assert torch.equal(case.table.lengths, expected.lengths)
    for row, length in enumerate(expected.lengths.tolist()):
        pages = -(-length // case.page_size)
        assert torch.equal(case.table.head_pages[row, :pages], expected.head_pages[row, :pages])


def test_a_request_without_drafts_gets_the_pages_that_it_gets_alone():
    """In a batch in which others have some: its one token is asked several times, which changes no order."""
    lens = [900, 700, 1300]
    for most in (2, 3, 4, 9):
        case = make(lens, 2, 4, 64, budget_pages=8, query_tokens=[1, most, 1], most_tokens=most)
        launchers.range_score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
        launchers.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
        together = case.table.head_pages.clone()
        plan = case.plan.rows(3, ONE)
        scores = poisoned_scores(8, case.scores.capacity_pages, 3, DEVICE)
        q = case.q[case.plan.queries.starts[:-1].long()]
        launchers.range_score(q, case.kv, case.block_table, plan, case.geometry, scores)
        launchers.select_pages(scores, case.block_table, plan, case.kv, case.selection(), case.table)
        for row in (0, 1, 4, 5):
            assert torch.equal(together[row, :8], case.table.head_pages[row, :8])


def choose(case: Case) -> None:
    reference.page_mass(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)


@shapes
@drafts
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_attention_of_drafts(shape, most, dtype):
    """Each token attends to the chosen pages up to itself; what is no token of a request is left as it is."""
    case = case_of(shape, most, dtype=dtype)
    choose(case)
    extra = torch.zeros(3, *case.q.shape[1:], dtype=dtype, device=DEVICE)  # tokens of other rows of the step
    q = torch.cat([case.q, extra])
    found, expected = torch.full_like(q, 7.0), torch.full_like(q, 7.0, dtype=torch.float64)
    launchers.sparse_decode(q, case.kv, case.table, case.geometry, found)
    exact = in_float64(case.kv)
    reference.sparse_decode(q.double(), exact, case.table, case.geometry, expected)
    assert error(found, expected) < TOLERANCE[dtype]
    first, count = case.plan.queries.spans(len(LENGTHS))[1]
    assert (found[first : first + count] == 7.0).all() and (found[-3:] == 7.0).all()


@shapes
@drafts
def test_a_budget_of_the_context_is_dense_attention(shape, most):
    case = case_of(shape, most, budget_pages=64)
    choose(case)
    found = torch.full_like(case.q, float("nan"))
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, found)
    starts, length_of = case.plan.queries.starts, case.seq_lens.tolist()
    for request, (first, count) in enumerate(case.plan.queries.spans(len(LENGTHS))):
        pages = case.block_table[request, : -(-length_of[request] // case.page_size)].long()
        content = case.kv[pages, :, : case.page_size].transpose(0, 1).flatten(1, 2).double()
        keys, values = content.chunk(2, -1)
        for token in range(count if length_of[request] else 0):
            seen = length_of[request] - (count - 1 - token)
            query = case.q[first + token].double().view(case.kv_heads, shape[1], -1)
            weights = (query @ keys[:, :seen].transpose(1, 2) * case.scale).softmax(-1)
            assert error(found[first + token], (weights @ values[:, :seen]).flatten(0, 1)) < 2e-5
    assert len(starts) == len(LENGTHS) + 1


def test_prompt_tokens_beside_drafts_see_their_whole_context():
    """A prompt's last few tokens lie among rows with drafts; they are read through the block table."""
    case = case_of((2, 3, 64, 16), 4)
    case.plan.whole[3:6] = 1
    args = (case.seq_lens, case.plan, case.table, case.selection(), 0, case.scores.capacity_pages, False)
    launchers.plan_decode(*args)
    case.table.routes, case.table.block_table = case.plan.score_offsets, case.block_table
    choose(case)
    found = torch.full_like(case.q, float("nan"))
    expected = torch.full_like(case.q, float("nan"), dtype=torch.float64)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, found)
    reference.sparse_decode(case.q.double(), in_float64(case.kv), case.table, case.geometry, expected)
    rows = ~expected.isnan()
    assert error(found[rows], expected[rows]) < 2e-5
    first, count = case.plan.queries.spans(len(LENGTHS))[5]
    pages = case.block_table[5, : -(-LENGTHS[5] // 16)].long()
    keys, values = case.kv[pages, 0, :16].flatten(0, 1)[: LENGTHS[5]].double().chunk(2, -1)
    weights = (case.q[first + count - 1, :3].double() @ keys.T * case.scale).softmax(-1)
    assert error(found[first + count - 1, :3], weights @ values) < 2e-5


@drafts
def test_steps_are_counted_by_query_token(most):
    case = case_of((2, 3, 64, 16), most)
    case.plan.whole[3] = 1
    for kernels in (launchers, reference):
        case.plan.counters.zero_()
        kernels.plan_decode(
            case.seq_lens, case.plan, case.table, case.selection(), 0, case.scores.capacity_pages, False
        )
        attended = context = 0
        for request, (_, count) in enumerate(case.plan.queries.spans(len(LENGTHS))):
            length = LENGTHS[request]
            kept = length - max(-(-length // 16) - case.budget_pages, 0) * 16
            for later in range(min(count, length) if request != 3 else 0):
                attended, context = attended + kept - later, context + length - later
        assert case.plan.counters.tolist() == [attended, context]


def test_recall_is_that_of_the_last_token():
    from vllm_sparse.pages.recall_sums import RecallSums

    case = case_of((2, 3, 64, 16), 4)
    choose(case)
    sums = [RecallSums.allocate(1, 1, 6, 2, DEVICE) for _ in range(2)]
    args = (case.q, case.kv, case.block_table, case.plan, case.table, case.geometry)
    for kernels, monitor in zip((launchers, reference), sums, strict=True):
        for _ in range(3):
            monitor.step.add_(1)
            kernels.recall_mass(*args, monitor, 0)
    assert torch.allclose(*(monitor.sums for monitor in sums), rtol=1e-4) and (sums[0].sums[..., 1] == 3).all()
    assert (
        torch.allclose(sums[0].sums[0, :, 0] / 3, sums[0].sums[0, :, 0] / 3) and (sums[0].sums[..., 0] < 3).all()
    )


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@drafts
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_codes_of_long_rows(most, group):
    """e4m3 pages, rows that many programs share."""
    more = {"kv_dtype": torch.float8_e4m3fn, "kv_scales": (0.5, 2.0)}
    case = make([5000, 40, 9000], 2, group, 128, 16, 128, dtype=torch.bfloat16, query_tokens=[most, 1, most],
                most_tokens=most, **more)  # fmt: skip
    choose(case)
    found, expected = (torch.full_like(case.q, float("nan")) for _ in range(2))
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, found)
    reference.sparse_decode(case.q, case.kv, case.table, case.geometry, expected)
    assert error(found, expected) < 2e-2

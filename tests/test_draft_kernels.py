"""Kernels of decode rows with drafts: several query tokens a request, whose pages are chosen and read together."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, ON_GPU, TOLERANCE, Case, error, in_float64, make, poisoned_scores
from test_kernels import shape_id

from vllm_sparse.kernels import reference
from vllm_sparse.pages.decode_plan import PROMPT
from vllm_sparse.pages.query_tokens import ONE

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


SCORERS = {
    "bound": ("range_score", "key_range", {"slack": 1.0}), "middle": ("range_score", "key_range", {"slack": 0.4}),
    "sketch1": ("sketch_score", "sketch1", {"summary": "sketch1"}),
    "sketch2": ("sketch_score", "sketch2", {"summary": "sketch2"}), "mass": ("page_mass", "none", {}),
}  # fmt: skip


@pytest.mark.parametrize("most", [4, 17])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=shape_id)
@pytest.mark.parametrize("scorer", SCORERS)
def test_pages_are_scored_by_the_mean_query(shape, most, scorer):
    """By a key range, which is linear, that is the mean of every token's score."""
    name, summary, settings = SCORERS[scorer]
    case = case_of(shape, most, summary=summary)
    count, capacity = len(LENGTHS), case.scores.capacity_pages
    spans, one = case.plan.queries.spans(count), case.plan.rows(count, ONE)

    def scores_of(kernels, q, plan):
        scores = poisoned_scores(case.scores.q_heads, capacity, count, DEVICE)
        getattr(kernels, name)(q, case.kv, case.block_table, plan, case.geometry, scores, **settings)
        return scores

    if name == "range_score":
        last = [[first + min(token, n - 1) for first, n in spans] for token in range(most)]
        alone = [scores_of(reference, case.q[tokens], one).values for tokens in last]
        of_request = torch.zeros(capacity, dtype=torch.long, device=DEVICE)
        for request, (_, n) in enumerate(spans):
            offset = int(case.plan.score_offsets[request])
            if offset >= 0:
                of_request[offset : offset + -(-LENGTHS[request] // case.page_size)] = n
        expected = sum(torch.where(of_request > token, alone[token], 0) for token in range(most)) / of_request
    else:
        mean = torch.stack([case.q[first : first + n].mean(0) for first, n in spans])
        expected = scores_of(reference, mean, one).values
    alone = scores_of(reference, case.q[: len(LENGTHS)], one).values
    written = alone.isfinite()
    assert written.any()
    for kernels in (launchers, reference):
        found = scores_of(kernels, case.q, case.plan)
        assert torch.equal(alone.isnan(), found.values.isnan()) and torch.equal(written, found.values.isfinite())
        assert error(found.values[written], expected[written]) < 1e-3
    chunks = scores_of(reference, case.q, case.plan).chunk_lse
    found = scores_of(launchers, case.q, case.plan).chunk_lse
    assert torch.equal(chunks.isnan(), found.isnan()) and torch.equal(chunks.isneginf(), found.isneginf())
    assert error(*(x.nan_to_num(neginf=0.0) for x in (found, chunks))) < 1e-3


@pytest.mark.parametrize("most", [2, 3, 4, 9])
def test_a_request_without_drafts_gets_the_pages_that_it_gets_alone(most):
    case = make([900, 700, 1300], 2, 4, 64, budget_pages=8, query_tokens=[1, most, 1], most_tokens=most)
    launchers.range_score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    first = case.plan.queries.starts[:-1].long()
    alone = poisoned_scores(8, case.scores.capacity_pages, 3, DEVICE)
    plan = case.plan.rows(3, ONE)
    launchers.range_score(case.q[first], case.kv, case.block_table, plan, case.geometry, alone)
    for request in (0, 2):
        offset = int(plan.score_offsets[request])
        pages = slice(offset, offset + -(-int(case.seq_lens[request]) // 16))
        assert torch.equal(case.scores.values[:, pages], alone.values[:, pages])


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
    case.plan.budgets[3:6] = PROMPT
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
    case.plan.budgets[3] = PROMPT
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
        assert case.plan.counters[:2].tolist() == [attended, context]


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

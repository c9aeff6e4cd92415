"""Kernels and references over a KV cache of e4m3: they read, and write, what was quantised."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, TOLERANCE, error, make
from prefill_cases import causal_mask, make_chunk, masked_attention, random_keep

from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.kernels import reference
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import SUMMARIES, summary_slots

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers

E4M3 = torch.float8_e4m3fn
SCALES = (0.031, 0.27)
"""Of K and V: no powers of two, and both matter."""
LENGTHS = [1, 0, 16, 17, 33, 200, 389]

BOTH = pytest.mark.parametrize("run", [launchers, reference], ids=["triton", "torch"])
decoded = pytest.mark.parametrize(
    "shape, dtype",
    # Even in Triton's interpreter: over codes, queries in bfloat16 are multiplied in float16.
    [((2, 3, 64, 16), torch.float32), ((3, 4, 96, 32), torch.float16), ((1, 7, 256, 16), torch.bfloat16)],
)


def make_fp8(lengths, shape=(2, 3, 64, 16), budget_pages=4, **more):
    return make(lengths, *shape, budget_pages, kv_dtype=E4M3, kv_scales=SCALES, **more)


def numbers(kv: torch.Tensor, page_size: int) -> torch.Tensor:
    """float64 [num_blocks, kv_heads, page_size, 2 * head_dim]: K and V that the codes of a cache stand for."""
    k, v = kv[:, :, :page_size].double().chunk(2, -1)
    return torch.cat([k * SCALES[0], v * SCALES[1]], -1)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@BOTH
def test_codes_are_rounded_to_the_nearest_and_saturated(run):
    """Every sign and size: zeros, what rounds to zero, subnormals, ties, the largest, beyond it, no number."""
    special = [0.0, -0.0, 2**-10, 2**-10 * 1.01, 3 * 2**-10, 447.9, 448, 464, 465, 1e9, float("inf"), float("nan")]
    sizes = torch.cat(
        [torch.tensor(special), torch.rand(500) * 600, 2.0 ** torch.randint(-12, 9, (500,)) * 1.0625]
    )
    values = torch.cat([sizes, -sizes]).to(DEVICE)
    head_dim = 32
    tokens = torch.nn.functional.pad(values, (0, -len(values) % head_dim)).view(-1, 1, head_dim)
    kv = torch.zeros(-(-len(tokens) // 16), 1, 16, 2 * head_dim, device=DEVICE).to(E4M3)
    run.page_write(tokens, 2 * tokens, kv, torch.arange(len(tokens), device=DEVICE), 16, "none", 1.0, 2.0)
    k, v = kv.flatten(0, 2)[: len(tokens)].float().chunk(2, -1)
    exact = tokens[:, 0].clamp(-448, 448).cpu().to(E4M3).float().to(DEVICE)
    for found in (k, v):
        assert torch.equal(found.nan_to_num(nan=7e7), exact.nan_to_num(nan=7e7))


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("shape, dtype", [((3, 4, 96, 32), torch.float32), ((1, 7, 64, 16), torch.bfloat16)])
def test_page_write_in_chunks(shape, dtype, summary):
    """Written in chunks that begin and end within pages, as the reference does."""
    kv_heads, _, head_dim, page_size = shape
    slots = summary_slots(summary, page_size, head_dim, 1)
    caches = [
        torch.full((7, kv_heads, page_size + slots, 2 * head_dim), float("nan"), device=DEVICE).to(E4M3)
        for _ in range(2)
    ]
    tokens = torch.randn(2, 5 * page_size, kv_heads, head_dim, device=DEVICE).to(dtype)
    order = torch.tensor([4, 1, 5, 2, 0], device=DEVICE)[:, None] * page_size
    places = (order + torch.arange(page_size, device=DEVICE)).flatten()
    begin = 0
    for count in (1, page_size - 2, 5, 2 * page_size, 1, page_size // 2):
        chunk = slice(begin, begin + count)
        for run, kv in zip((launchers, reference), caches, strict=True):
            run.page_write(*tokens[:, chunk], kv, places[chunk], page_size, summary, *SCALES)
        begin += count
    actual, expected = caches
    assert same_bytes(actual[:, :, :page_size], expected[:, :, :page_size])
    written = order.flatten()[: begin // page_size] // page_size
    if summary == "key_range":
        found = [reference.key_range(kv[written], page_size) for kv in caches]
    elif summary != "none":
        found = [reference.sketched_keys(kv[written], page_size, summary) for kv in caches]
    else:
        return
    for mine, other in zip(*found, strict=True):
        if summary != "key_range":
            mine, other = (x.transpose(1, 2).flatten(0, 1) for x in (mine, other))
        assert error(mine, other) < 0.02


@BOTH
def test_summaries_are_of_the_codes(run):
    """A range holds the codes of its page, and not the numbers that they were made of."""
    case = make_fp8([16])
    kv = torch.zeros_like(case.kv)
    key = 3 + torch.rand(16, 2, 64, device=DEVICE)
    run.page_write(key, key, kv, torch.arange(16, device=DEVICE), 16, "key_range", 0.01, 1.0)
    codes = kv[0, :, :16, :64].float()
    centre, half = (x[0] for x in reference.key_range(kv, 16))
    slack = 1e-4 * codes.abs().amax()
    assert (centre - half <= codes.amin(1) + slack).all() and (centre + half >= codes.amax(1) - slack).all()
    assert (half <= (codes.amax(1) - codes.amin(1)) / 2 + codes.abs().amax() / 60).all()
    assert centre.min() > 280, "unscaled"


@BOTH
@decoded
def test_sparse_decode(run, shape, dtype):
    case = make_fp8(LENGTHS, shape, dtype=dtype)
    reference.page_mass(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    out = torch.full_like(case.q, 7.0)
    run.sparse_decode(case.q, case.kv, case.table, case.geometry, out)
    kv_heads, group, _, page_size = shape
    context, grid = numbers(case.kv, page_size), HeadPageGrid.of(case.kv)
    for row, length in enumerate(case.table.lengths.tolist()):
        request, head = divmod(row, kv_heads)
        span = slice(head * group, (head + 1) * group)
        if length == 0:
            assert (out[request, span] == 7.0).all()
            continue
        blocks, heads = grid.split(case.table.head_pages[row, : -(-length // page_size)].long())
        k, v = context[blocks, heads].flatten(0, 1)[:length].chunk(2, -1)
        weights = (case.q[request, span].double() @ k.T * case.scale).softmax(-1)
        assert error(out[request, span], weights @ v) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_sizes_of_queries(size):
    """Queries in bfloat16 that are far from 1 lose nothing where they are multiplied in float16."""
    case = make_fp8([389], dtype=torch.bfloat16)
    q = case.q * size
    geometry = case.geometry.quantised(1 / size, 1.0, 1.0)
    found = []
    for run in (launchers, reference):
        run.recency_score(case.block_table, case.plan, 16, case.scores)
        run.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
        found.append(torch.empty_like(q))
        run.sparse_decode(q, case.kv, case.table, geometry, found[-1])
    assert error(*found) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("shape", [(3, 4, 96, 32), (2, 8, 64, 16)])
def test_scores_of_decode(shape):
    case = make_fp8(LENGTHS, shape)
    arguments = (case.q, case.kv, case.block_table, case.plan, case.geometry)
    for name in ("page_mass", "range_score"):
        found = []
        for run in (launchers, reference):
            getattr(run, name)(*arguments, case.scores)
            found.append(case.scores.values.clone().nan_to_num())
            case.scores.values.fill_(float("nan"))
        assert error(*found) < 2e-3, name


@pytest.mark.parametrize("summary", ["sketch1", "sketch2"])
def test_scores_of_sketches(summary):
    case = make_fp8(LENGTHS, summary=summary)
    found = []
    for run in (launchers, reference):
        run.sketch_score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores, summary)
        found.append(case.scores.values.clone().nan_to_num())
        case.scores.values.fill_(float("nan"))
    assert error(*found) < 0.05


def test_recall_of_chosen_pages():
    """Ten of 25."""
    case = make_fp8([389, 200], budget_pages=40)
    case.plan.totals[0] = 1
    sums = []
    for run in (launchers, reference):
        monitor = RecallMonitor.allocate(1, 1, 6, 2, DEVICE)
        case.plan.work[0, :2] = torch.tensor([0, 389])
        grid = HeadPageGrid.of(case.kv)
        for head in range(2):
            case.table.head_pages[head, :10] = grid.head_pages(case.block_table[0, :10], head).int()
            case.table.lengths[head] = 160
        run.recall_mass(*(case.q, case.kv, case.block_table, case.plan), case.table, case.geometry, monitor, 0)
        sums.append(monitor.sums.clone())
    assert error(*sums) < 1e-4 and ((sums[0][..., 0] > 0) & (sums[0][..., 0] < 1)).all()


@BOTH
@decoded
def test_sparse_prefill(run, shape, dtype):
    _, _, head_dim, page_size = shape
    case = make_chunk(70, 150, 1, 2, head_dim, page_size, dtype, kv_dtype=E4M3, kv_scales=SCALES)
    table = case.buffers.table(case.blocks)
    reference.prefill_table(
        torch.ones_like(random_keep(case)), case.block_table, case.blocks, case.kv,
        Selection(page_size, 1, 1, 20), torch.zeros(2, dtype=torch.int64, device=DEVICE), table,
    )  # fmt: skip
    out = torch.full_like(case.q, float("nan"))
    run.sparse_prefill(case.q, case.kv, table, case.geometry, out)
    assert error(out, masked_attention(case, causal_mask(case))) < TOLERANCE[dtype]
    starts = torch.tensor([0, 150], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([220], dtype=torch.int32, device=DEVICE)
    reference.dense_attention(case.q, case.kv, case.block_table[None], starts, lens, case.geometry, out)
    assert error(out, masked_attention(case, causal_mask(case))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[-1:], ids=lambda dtype: str(dtype)[6:])
def test_estimates_of_prefill(dtype):
    case = make_chunk(200, 150, 2, 3, 64, 16, dtype, kv_dtype=E4M3, kv_scales=SCALES)
    pages = (case.q, case.kv, case.block_table, case.blocks, case.geometry)
    seen = (200 + BLOCK_TOKENS - 1) // 16 + 1  # pages that the first block may attend to
    found: dict[str, list] = {"probe_mass": [], "pooled_score": [], "antidiagonal_score": [], "sample_mass": []}
    for run in (launchers, reference):
        mass, scores = case.buffers.probe_masses(case.blocks), case.buffers.scores(case.blocks)
        run.probe_mass(*pages, case.buffers.probe_lse, torch.empty(1 << 20, dtype=dtype, device=DEVICE), mass)
        found["probe_mass"].append(mass.clone())
        run.pooled_score(*pages, case.buffers.pooled, scores)
        found["pooled_score"].append(scores.clone())
        run.antidiagonal_score(*pages, scores)
        found["antidiagonal_score"].append(scores.view(case.q_heads, 2, -1)[:, 0, :seen].exp())
        run.sample_mass(*pages, case.buffers.scratch, scores)
        found["sample_mass"].append(scores.view(case.q_heads, 2, -1)[:, 1].exp())
    for name, both in found.items():
        assert error(*both) < 3 * TOLERANCE[dtype], name


@BOTH
def test_offload_moves_codes_as_they_are(run):
    from offload_cases import make_store

    store = make_store(24, summary_slots=1)
    host, hot, summaries = (
        (torch.randn(x.shape, device=DEVICE) * 50).to(E4M3) for x in (store.host, store.hot, store.summaries)
    )
    blocks = torch.tensor([3, 9, 1], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(5, *host.shape[1:], device=DEVICE).to(E4M3)
    run.read_pages(host, blocks, out, torch.tensor([2, -1, 0], dtype=torch.int32, device=DEVICE), 4)
    assert same_bytes(out[2], host[3]) and same_bytes(out[0], host[1])
    assert not out[[1, 3, 4]].float().any()
    slots = torch.tensor([5 * 16 + 7, 5 * 16 + 8, 7 * 16], dtype=torch.int64, device=DEVICE)
    run.plan_writes(slots, 16, store.plan)
    run.stage_pages(host, summaries, store.plan, 3, hot)
    assert same_bytes(hot[0, :, :7], host[5, :, :7]) and same_bytes(hot[0, :, 16:], summaries[5])
    old = host.clone()
    run.write_through(hot, store.plan, 3, host, summaries, store.hot_set)
    assert same_bytes(host[5, :, 7:9], hot[0, :, 7:9]) and same_bytes(host[7, :, :1], hot[1, :, :1])
    assert same_bytes(host[5, :, 9:], old[5, :, 9:]) and same_bytes(summaries[7], hot[1, :, 16:])


@BOTH
def test_offload_attends_to_codes_on_the_host(run):
    from offload_cases import chosen_pages, make_store

    store = make_store(24, head_dim=64)
    host, hot = ((torch.randn(x.shape, device=DEVICE) * 50).to(E4M3) for x in (store.host, store.hot))
    table = chosen_pages(store, [[*range(8)], [5, 11]], 16)
    q = torch.randn(2, 6, 64, device=DEVICE)
    resident = torch.cat([host, torch.zeros_like(host[:, :, :1])], 2)
    geometry = make_fp8([1]).geometry
    expected = torch.empty_like(q)
    reference.sparse_decode(q, resident, table, geometry, expected)
    run.plan_writes(torch.tensor([5 * 16], device=DEVICE), 16, store.plan)
    table.head_pages.copy_(torch.where(table.head_pages < 2**29, ~table.head_pages, table.head_pages))
    in_place = torch.empty_like(q)
    run.sparse_decode(q, hot, table, geometry, in_place, host)
    assert error(in_place, expected) < TOLERANCE[torch.float32]


@BOTH
@pytest.mark.parametrize("by_head", [False, True])
def test_queries_are_coded_in_any_order(run, by_head):
    q = torch.randn(37, 6, 96, device=DEVICE)[:, ::2] * 300
    q[0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    out = torch.zeros(3, 37, 96, device=DEVICE).to(E4M3).transpose(0, 1)
    if not by_head:
        out = out.contiguous()
    run.code_queries(q, 0.7, out)
    exact = (q / 0.7).clamp(-448, 448).cpu().to(E4M3).float().to(DEVICE)
    assert torch.equal(out.float().nan_to_num(nan=7e7), exact.nan_to_num(nan=7e7))

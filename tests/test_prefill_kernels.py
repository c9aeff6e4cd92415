"""Prefill kernels against their references, and the references against explicit masks and sums."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import DEVICE, DTYPES, TOLERANCE, error
from prefill_cases import (
    SIXTEEN_BITS,
    attention_weights,
    causal_mask,
    expected_mask,
    keys_and_values,
    make_chunk,
    masked_attention,
    poison,
    random_keep,
    table_mask,
)

from vllm_sparse.kernels import reference
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.probe import probe_groups, probe_page, probe_parts, probe_queries, probe_start
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.pages.sample import sample_room
from vllm_sparse.pages.selection import Selection

pytest.importorskip("triton")
from vllm_sparse.kernels import antidiagonal_score, launchers

# (first position, tokens): chunks that begin and end inside pages, and blocks that no page border meets.
CHUNKS = [(0, 129), (0, 64), (37, 200), (333, 130), (256, 256), (190, 77), (500, 12)]
# (kv_heads, group, head_dim, page_size)
SHAPES = [(2, 3, 64, 16), (1, 1, 128, 32), (1, 4, 96, 64), (1, 2, 32, 128), (1, 7, 64, 256)]
SINK_PAGES, WINDOW_TOKENS = 1, 40
BOTH = pytest.mark.parametrize("run", [reference, launchers], ids=["reference", "kernel"])
chunks = pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: "{}+{}".format(*chunk))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_group{}_d{}_page{}".format(*shape))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def build(run, case, keep, sink_pages=SINK_PAGES, window_tokens=WINDOW_TOKENS) -> PageTable:
    table = case.buffers.table(case.blocks)
    run.prefill_table(
        keep, case.block_table, case.blocks, case.kv, Selection(case.page_size, 1, sink_pages, window_tokens),
        case.buffers.counters, table,
    )  # fmt: skip
    return table


def random_chunks(count: int):
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        first, tokens = torch.randint(0, 700, (2,), generator=generator).tolist()
        yield first, tokens % 400 + 1, 2 ** (4 + first % 3)


@BOTH
@pytest.mark.parametrize(("first", "tokens", "page_size"), [*random_chunks(12), (0, 1, 16), (129, 1, 16)])
def test_table_means_the_keep_mask_token_by_token(run, first, tokens, page_size):
    """At random offsets, chunk lengths and page sizes, with later context that nobody may see."""
    case = make_chunk(first, tokens, 2, 2, 32, page_size, later_tokens=50)
    keep = random_keep(case)
    window_tokens = first % 3 * 25
    mask = table_mask(case, build(run, case, keep, first % 2, window_tokens))
    expected = expected_mask(case, keep, first % 2, window_tokens)
    assert torch.equal(mask, expected)
    attended, causal = case.buffers.counters.tolist()
    assert attended == expected.sum()
    assert causal == case.q_heads * sum(range(first + 1, first + tokens + 1))


@chunks
@shapes
def test_tables_match_reference(chunk, shape):
    case = make_chunk(*chunk, *shape, layers=2)
    keep = random_keep(case)
    expected = build(reference, case, keep)
    head_pages, lengths = expected.head_pages.clone(), expected.lengths.clone()
    counters = case.buffers.counters.clone()
    poison(case.buffers)
    case.buffers.counters.zero_()
    table = build(launchers, case, keep)
    assert torch.equal(table.lengths, lengths)
    assert torch.equal(case.buffers.counters, counters)
    for row, length in enumerate(lengths.tolist()):
        pages = -(-length // case.page_size)
        assert torch.equal(table.head_pages[row, :pages], head_pages[row, :pages])


@BOTH
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("chunk", [(37, 200), (0, 129), (190, 77)], ids=str)
@dtypes
def test_sparse_prefill_is_attention_under_the_mask(run, shape, chunk, dtype):
    case = make_chunk(*chunk, *shape, dtype=dtype)
    keep = random_keep(case)
    table = build(reference, case, keep)
    out = torch.full_like(case.q, float("nan"))
    run.sparse_prefill(case.q, case.kv, table, case.geometry, out)
    exact = masked_attention(case, expected_mask(case, keep, SINK_PAGES, WINDOW_TOKENS))
    assert error(out, exact) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("head_dim", [32, 256, 512])
def test_sparse_prefill_with_every_page_is_dense_attention(run, head_dim):
    case = make_chunk(70, 150, 1, 2, head_dim, 16)
    table = build(reference, case, torch.ones_like(random_keep(case)))
    out = torch.full_like(case.q, float("nan"))
    run.sparse_prefill(case.q, case.kv, table, case.geometry, out)
    dense = torch.full_like(case.q, float("nan"))
    starts = torch.tensor([0, 150], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([220], dtype=torch.int32, device=DEVICE)
    reference.dense_attention(case.q, case.kv, case.block_table[None], starts, lens, case.geometry, dense)
    assert error(out, dense) < TOLERANCE[torch.float32]


def probe(run, case, elements=1 << 20) -> torch.Tensor:
    chunk = case.blocks
    mass = torch.full(
        (case.q_heads, probe_groups(case.page_size) + 1, chunk.num_pages(case.page_size)),
        float("nan"), device=DEVICE,
    )  # fmt: skip
    run.probe_mass(
        case.q, case.kv, case.block_table, chunk, case.geometry, case.buffers.probe_lse,
        torch.full((elements,), float("nan"), dtype=case.kv.dtype, device=DEVICE), mass,
    )  # fmt: skip
    return mass


@BOTH
@shapes
@pytest.mark.parametrize("chunk", [(0, 129), (37, 200), (333, 130), (256, 256), (500, 12)], ids=str)
def test_probe_mass_sums_the_attention_of_the_last_queries(run, shape, chunk):
    case = make_chunk(*chunk, *shape)
    mass = probe(run, case)
    page, blocks = case.page_size, case.blocks
    start = probe_start(blocks, page)
    assert blocks.end_position - 64 <= start < blocks.end_position - 64 + min(page, 64)
    first = max(start, blocks.first_position)
    weights = attention_weights(case)[:, first - blocks.first_position :]
    expected = torch.zeros_like(mass, dtype=torch.float64)
    for i, j in torch.cartesian_prod(torch.arange(weights.shape[1]), torch.arange(blocks.end_position)).tolist():
        if j <= first + i:
            k = (first + i - j) // page + j // page + 1 - probe_page(blocks, page)
            expected[:, k, j // page] += weights[:, i, j]
    assert error(mass, expected) < 1e-5


@dtypes
def test_probe_mass_matches_reference(dtype):
    case = make_chunk(300, 211, 2, 3, 64, 16, dtype=dtype)
    assert error(probe(launchers, case), probe(reference, case)) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("size", [0.8, 12], ids=["large", "past_float32"])
def test_probe_mass_takes_a_few_heads_at_a_time_and_logits_of_any_size(dtype, size):
    """Keys far along a query, late in the context: no reference from earlier keys comes close."""
    case = make_chunk(300, 211, 2, 4, 64, 16, dtype=dtype)
    case.kv[int(case.block_table[28]), :, 3, :64] = size * case.q[200, ::4]
    whole = probe(launchers, case)
    few = probe(launchers, case, probe_parts(case.blocks.end_position))
    expected = probe(reference, case)
    assert error(few, whole) < TOLERANCE[dtype]
    if size < 1:
        assert error(whole, expected) < TOLERANCE[dtype]
    # The row of that query alone adds 1; past float32 its tile's pages (4 at most) share it.
    pages = whole.sum(1)
    assert (
        torch.isfinite(whole).all() and (pages[::4, 28:29] > 0.2).all() and (expected.sum(1)[::4, 28] > 0.9).all()
    )


@pytest.mark.parametrize("end", [200, 511])
def test_probe_mass_of_logits_far_below_zero(end):
    """Softmax sums so small that a row's share of a split in which it sees nothing must not be divided by them."""
    case = make_chunk(64, end - 64, 1, 2, 32, 16)
    case.q[:] = case.q.abs() + 1
    case.kv[..., :32] = case.kv[..., :32].abs().neg() * 10 - 30
    mass, expected = probe(launchers, case), probe(reference, case)
    assert (case.q[-1] @ case.kv[int(case.block_table[0]), 0, 0, :32] * case.scale < -90).all()
    assert torch.isfinite(mass).all() and error(mass, expected) < TOLERANCE[torch.float32]


def select(run, case, mass, vertical=3, slash=4, top_p=0.0, patterns=None):
    """``vertical`` pages and ``slash`` bands, or ``top_p``, in every head; or ``patterns`` of heads."""
    page, buffers = case.page_size, case.buffers
    patterns = patterns or [HeadPattern(vertical * page, slash * page, top_p=top_p)] * case.q_heads
    run.select_bands(
        mass, case.blocks, page, HeadPatterns.of(patterns, page, DEVICE), SINK_PAGES,
        buffers.masses, buffers.page_keep, buffers.band_count,
    )  # fmt: skip
    pages = case.num_pages
    found = (buffers.masses[..., :pages], buffers.page_keep[:, :pages], buffers.band_count[:, : pages + 1])
    return [x.clone() for x in found]


ALL = 10**6
SIZES = [
    (3, 4, 0.0),
    (0, 5, 0.0),
    (7, 0, 0.0),
    (ALL, 1, 0.0),
    (1, ALL, 0.0),
    (1, 1, 0.6),
    (0, 0, 0.99),
    (1, 1, 1.0),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_select_bands_matches_reference(page_size, sizes):
    case = make_chunk(700, 333, 1, 3, 32, page_size)
    shape = (case.q_heads, probe_groups(page_size) + 1, case.num_pages)
    # Sums of such numbers are exact in any order, so both sides see the same ties.
    mass = torch.randint(0, 64, shape, device=DEVICE).float() / 64
    mass[0] = 0
    expected = select(reference, case, mass, *sizes)
    poison(case.buffers)
    for mine, right in zip(select(launchers, case, mass, *sizes), expected, strict=True):
        assert torch.equal(mine, right)


MIXED = [
    HeadPattern(top_p=0.8),
    HeadPattern(recent_tokens=100),
    HeadPattern(40, 70),
    HeadPattern(48, 64, 100),
    HeadPattern(10**7, 0),
    HeadPattern(top_p=1.0),
    HeadPattern(top_p=0.5, recent_tokens=65),
    HeadPattern(),
]


@pytest.mark.parametrize("page_size", [16, 64])
def test_heads_of_a_launch_have_patterns_of_their_own(page_size):
    """Kernel and reference choose for each head what they choose where all heads have its pattern."""
    case = make_chunk(700, 333, 4, 2, 32, page_size)
    shape = (case.q_heads, probe_groups(page_size) + 1, case.num_pages)
    mass = torch.randint(0, 64, shape, device=DEVICE).float() / 64
    found = []
    for run in (reference, launchers):
        poison(case.buffers)
        found.append(select(run, case, mass, patterns=MIXED)[1:])
    assert all(torch.equal(expected, mine) for expected, mine in zip(*found, strict=True))
    pages, counts = found[0]
    for head, pattern in enumerate(MIXED):
        poison(case.buffers)
        alone = select(reference, case, mass, patterns=[pattern] * case.q_heads)[1:]
        assert torch.equal(alone[0][head], pages[head]) and torch.equal(alone[1][head], counts[head])


@BOTH
@pytest.mark.parametrize(("first", "tokens"), [(900, 200), (801, 131)])
def test_mixed_heads_keep_what_their_patterns_say(run, first, tokens):
    """Token by token: what a pattern says whatever the estimate, and the share that one asks for."""
    case = make_chunk(first, tokens, 4, 2, 32, 16)
    mass = probe(reference, case)
    select(run, case, mass, patterns=MIXED)
    buffers = case.buffers
    keep = torch.full_like(random_keep(case), 77)
    run.vertical_slash(buffers.page_keep, buffers.band_count, case.blocks, 16, keep)
    mask = expected_mask(case, keep, 1, 0)
    causal = causal_mask(case)
    position = case.blocks.first_position + torch.arange(tokens, device=DEVICE)[:, None]
    key = torch.arange(case.blocks.end_position, device=DEVICE)

    def by_pages(tokens_kept):
        """What a block keeps of keys that any of its queries wants, and its own and the first page."""
        wanted = torch.nn.functional.pad(tokens_kept & causal, (0, -len(key) % 16)).unflatten(1, (-1, 16)).any(2)
        blocks = [wanted[i : i + BLOCK_TOKENS].any(0).int() for i in range(0, tokens, BLOCK_TOKENS)]
        return expected_mask(case, torch.stack(blocks * case.q_heads), 1, 0)[0]

    # 100 recent tokens are 7 bands of 16.
    a_shape = by_pages(position - key < 112)
    assert torch.equal(mask[1], a_shape)
    assert torch.equal(mask[4], causal) and torch.equal(mask[5], causal)
    assert torch.equal(mask[7], by_pages(torch.zeros_like(causal)))
    assert (mask[3] | ~a_shape).all() and mask[3].sum() > a_shape.sum(), "recent tokens come on top of sizes"
    assert (mask[6] | ~by_pages(position - key < 80)).all()
    probed = slice(probe_start(case.blocks, 16) - first, None)
    weights = attention_weights(case)[0, probed]
    assert (weights * mask[0, probed]).sum(1).mean() >= 0.799 and mask[0].sum() < causal.sum()


@BOTH
def test_select_bands_keeps_a_number_of_equal_masses(run):
    """Uniform attention, of random weights say, must not turn a size into everything."""
    case = make_chunk(900, 200, 1, 2, 32, 16)
    mass = torch.full((case.q_heads, probe_groups(16) + 1, case.num_pages), 0.25, device=DEVICE)
    _, pages, counts = select(run, case, mass, 5, 9)
    assert (pages.sum(1) == 5).all() and (counts[:, -1] == 9).all()
    assert pages[:, SINK_PAGES : SINK_PAGES + 5].all(), "equal masses: the first pages"


@BOTH
def test_select_bands_keeps_the_sizes_or_the_share_it_is_given(run):
    case = make_chunk(900, 200, 1, 2, 32, 16)
    mass = probe(reference, case)
    masses, pages, counts = select(run, case, mass, 5, 9)
    total = mass[:, :, SINK_PAGES:].sum((1, 2))
    assert torch.allclose(masses.sum(-1), total.expand(2, -1), rtol=1e-4), "sinks are attended anyway"
    assert (pages.sum(1) == 5).all() and (counts[:, -1] == 9).all()
    band = torch.stack([probe_page(case.blocks, 16) - 1 + k - torch.arange(case.num_pages) for k in range(5)])
    exists = (band >= 0) & (band < case.num_pages)

    def share(kept_pages, kept_bands):
        cells = kept_pages[:, None] | (kept_bands[:, band.clamp(0, case.num_pages - 1)] & exists.to(DEVICE))
        return (mass * cells)[:, :, SINK_PAGES:].sum((1, 2)) / total

    for top_p in (0.3, 0.9):
        masses, pages, counts = select(run, case, mass, top_p=top_p)
        pages, bands = pages.bool(), counts.diff(dim=1).bool()
        assert (share(pages, bands) >= top_p * 0.9999).all(), "less than what was asked for"
        worth = torch.cat([masses[0].where(pages, 9e9), (masses[1] / 4).where(bands, 9e9)], 1)
        more = worth.amin(1, keepdim=True) * 1.01
        assert (share(masses[0] >= more, masses[1] / 4 >= more) < top_p).all(), "more than what was asked for"


@BOTH
@chunks
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_vertical_slash_keeps_pages_that_a_band_touches(run, chunk, page_size):
    case = make_chunk(*chunk, 1, 2, 32, page_size)
    pages, blocks = case.num_pages, case.blocks
    page_keep = (torch.rand(2, pages, device=DEVICE) < 0.1).to(torch.uint8)
    bands = torch.rand(2, pages, device=DEVICE) < 0.1
    band_count = torch.nn.functional.pad(bands.cumsum(1), (1, 0)).int()
    keep = torch.full_like(random_keep(case), 77)
    run.vertical_slash(page_keep, band_count, blocks, page_size, keep)
    positions = blocks.first_position + torch.arange(blocks.num_tokens, device=DEVICE)
    behind = positions[:, None] - torch.arange(pages * page_size, device=DEVICE)
    slash = bands[:, behind.clamp(min=0) // page_size] & (behind >= 0)
    slash = slash.unflatten(2, (pages, page_size)).any(3)
    seen = (behind >= 0).unflatten(1, (pages, page_size)).any(2)
    for block in range(blocks.num_blocks):
        rows = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        expected = slash[:, rows].any(1) | (page_keep.bool() & seen[rows].any(0))
        assert torch.equal(keep.view(2, -1, pages)[:, block].bool(), expected)


def score(run, case, name: str) -> torch.Tensor:
    """[q_heads * num_blocks, num_pages], 0 from each block's own pages on."""
    scores = torch.full((len(random_keep(case)), case.num_pages), float("nan"), device=DEVICE)
    pooled = [case.buffers.pooled] if name == "pooled_score" else []
    getattr(run, name)(
        case.q, case.kv, case.block_table, case.blocks, case.geometry, *pooled, scores
    )  # fmt: skip
    for block, part in enumerate(case.blocks.split(1)):
        scores.view(case.q_heads, -1, case.num_pages)[:, block, part.first_position // case.page_size :] = 0
    return scores


@pytest.mark.parametrize("name", ["pooled_score", "antidiagonal_score"])
@pytest.mark.parametrize("chunk", [(300, 129), (637, 200), (790, 77)], ids=str)
@shapes
def test_scores_match_reference(shape, chunk, name):
    case = make_chunk(*chunk, *shape)
    assert error(score(launchers, case, name), score(reference, case, name)) < 1e-4


@pytest.mark.parametrize("name", ["pooled_score", "antidiagonal_score"])
@dtypes
def test_scores_match_reference_in_other_dtypes(dtype, name):
    case = make_chunk(300, 211, 2, 3, 64, 16, dtype=dtype)
    assert error(score(launchers, case, name), score(reference, case, name)) < TOLERANCE[dtype]


@BOTH
def test_pooled_score_is_the_product_of_means(run):
    case = make_chunk(37, 200, 1, 2, 32, 16)
    keys, _ = keys_and_values(case)
    scores = score(run, case, "pooled_score").view(2, 2, -1)
    query = case.q.double()[128:200, 1].mean(0)
    for page in (0, 7, 9):
        expected = query @ keys[1, page * 16 : page * 16 + 16].mean(0) * case.scale
        assert abs(scores[1, 1, page] - expected) < 1e-4


@BOTH
@pytest.mark.parametrize("group", [1, 3, 4])
def test_heads_that_do_not_ask_keep_their_rows(run, group):
    """Of three KV heads: one with all heads asking, one with some, one with none."""
    case = make_chunk(100, 130, 3, group, 32, 16)
    page, blocks = case.page_size, case.blocks
    heads = torch.zeros(case.q_heads, dtype=torch.uint8, device=DEVICE)
    heads[: group + group // 2] = 1
    asked = heads.bool().repeat_interleave(blocks.num_blocks)
    scored = (case.q, case.kv, case.block_table, blocks, case.geometry, case.buffers.pooled)
    everyone = torch.full((len(asked), case.num_pages), float("nan"), device=DEVICE)
    run.pooled_score(*scored, everyone)
    scores = torch.full_like(everyone, float("nan"))
    run.pooled_score(*scored, scores, heads)
    assert torch.equal(scores[asked], everyone[asked]) and scores[~asked].isnan().all()
    expected, keep = (torch.full_like(scores, 77, dtype=torch.uint8) for _ in range(2))
    run.select_row_pages(everyone, blocks, page, 3, 0.7, expected)
    run.select_row_pages(scores, blocks, page, 3, 0.7, keep, heads)
    assert torch.equal(keep[asked], expected[asked]) and (keep[~asked] == 77).all()


def probe_distances(case) -> torch.Tensor:
    """float64 [q_heads]: how far pooling is from the attention of the last 64 rows that have queries."""
    end = case.blocks.end_position
    queries = end - max(probe_start(case.blocks, case.page_size), case.blocks.first_position)
    block = torch.arange(end, device=DEVICE) // max(128, case.page_size)
    of_block = block == torch.arange(int(block[-1]) + 1, device=DEVICE)[:, None]
    true = attention_weights(case)[:, -queries:].mean(1) @ of_block.double().T
    keys, _ = keys_and_values(case)
    means = of_block.double() @ keys / of_block.sum(1, keepdim=True)
    query = case.q[-queries:].double().mean(0)
    pooled = (means @ query[:, :, None])[..., 0].mul(case.scale).softmax(-1)
    middle = (pooled + true) / 2
    return sum(part * (part / middle).log() for part in (pooled, true)).sum(-1).div(2).sqrt()


@BOTH
@dtypes
@pytest.mark.parametrize("chunk", [(300, 211), (500, 12), (200, 129)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 64, 16), (2, 1, 32, 32), (1, 4, 96, 64), (1, 1, 32, 256)], ids=str)
def test_pattern_distance_tells_heads_closer_than_the_threshold(run, shape, chunk, dtype):
    case = make_chunk(*chunk, *shape, dtype=dtype)
    case.q *= torch.logspace(-1, 0, case.q_heads, device=DEVICE)[:, None]
    queries = probe_queries(case.blocks, case.page_size)
    scores = case.buffers.masses[0, :, : case.num_pages]
    run.pooled_score(
        case.q[-queries.num_tokens :], case.kv, case.block_table, queries, case.geometry,
        case.buffers.pooled, scores,
    )  # fmt: skip
    mass, slack = probe(reference, case), max(1e-3, TOLERANCE[dtype])
    distances, flags = probe_distances(case), case.buffers.query_aware
    for threshold in torch.cat([distances - 1.01 * slack, distances + 1.01 * slack]).tolist():
        flags.fill_(77)
        if threshold > 0:
            run.pattern_distance(mass, scores, case.blocks, case.page_size, threshold, flags)
            assert (flags <= 1).all()
            sure = (distances - threshold).abs() > slack
            assert torch.equal(flags[sure].bool(), (distances < threshold)[sure])


@BOTH
def test_pattern_distance_of_what_is_equal_and_of_what_has_nothing_in_common(run):
    """Over more pages than a program takes at once, and with shares that are 0."""
    chunk = QueryBlocks(0, 0, 200, 2504 * 16 - 205)
    mass = torch.rand(3, 5, 2504, device=DEVICE)
    scores = (mass.sum(1).unflatten(1, (-1, 8)).sum(2).log() + 40).repeat_interleave(8, 1)
    # Keys within a block may differ, as long as their mean is the same.
    scores[:, :2496:2] += 1
    scores[:, 1:2496:2] -= 1
    mass[1:, :, 1248:] = 0
    scores[1, :1248] = -200
    flags = torch.full((3,), 77, dtype=torch.uint8, device=DEVICE)
    for threshold, expected in ((1e-3, [1, 0, 0]), (0.832, [1, 0, 1]), (0.833, [1, 1, 1])):
        run.pattern_distance(mass, scores, chunk, 16, threshold, flags)
        assert flags.tolist() == expected, "farthest is the root of log 2, 0.8326"


def test_antidiagonal_scores_of_more_blocks_than_a_program_holds(monkeypatch):
    monkeypatch.setitem(antidiagonal_score.TUNING, "token_bytes", 1)  # two blocks each
    case = make_chunk(75, 4 * BLOCK_TOKENS + 9, 1, 2, 32, 32)
    assert case.blocks.num_blocks == 5
    name = "antidiagonal_score"
    assert error(score(launchers, case, name), score(reference, case, name)) < 1e-4


@BOTH
def test_antidiagonal_score_samples_the_attention_of_a_block(run):
    case = make_chunk(32, 128, 1, 1, 32, 16)
    keys, _ = keys_and_values(case)
    logits = torch.zeros(8, 10, dtype=torch.float64, device=DEVICE)
    for r, j, s in torch.cartesian_prod(torch.arange(8), torch.arange(10), torch.arange(16)).tolist():
        logits[r, j] += case.q[16 * r + 15 - s, 0].double() @ keys[0, 16 * j + s] * case.scale / 16
    row, column = torch.arange(8, device=DEVICE)[:, None], torch.arange(10, device=DEVICE)
    weights = logits.masked_fill(column > row + 2, float("-inf")).softmax(-1)
    assert error(score(run, case, "antidiagonal_score").exp()[0, :2], weights.sum(0)[:2]) < 1e-4


def sampled(run, case) -> torch.Tensor:
    """float64 [q_heads, num_blocks, num_pages] of masses, -1 where nothing was written."""
    scores = torch.full(random_keep(case).shape, float("nan"), dtype=torch.float32, device=DEVICE)
    poison(case.buffers)
    run.sample_mass(case.q, case.kv, case.block_table, case.blocks, case.geometry, case.buffers.scratch, scores)
    return scores.double().exp().nan_to_num(-1).view(case.q_heads, case.blocks.num_blocks, -1)


@pytest.mark.parametrize("chunk", [(300, 129), (90, 560), (0, 1)], ids=str)
@shapes
def test_sample_mass_matches_reference(shape, chunk, monkeypatch):
    case = make_chunk(*chunk, *shape)
    expected = sampled(reference, case)
    assert error(sampled(launchers, case), expected) < SIXTEEN_BITS
    # As little memory as the buffers of the longest context have: few heads and blocks at a time.
    case.buffers.scratch = case.buffers.scratch.flatten()[: 16 * sample_room(case.blocks.end_position + 64)]
    case.buffers.scratch = case.buffers.scratch.to(torch.float16)
    assert error(sampled(launchers, case), expected) < SIXTEEN_BITS


@dtypes
def test_sample_mass_matches_reference_in_other_dtypes(dtype):
    case = make_chunk(300, 211, 2, 3, 64, 16, dtype=dtype, layers=2, later_tokens=50)
    assert error(sampled(launchers, case), sampled(reference, case)) < TOLERANCE[dtype] + SIXTEEN_BITS


def test_sample_mass_of_wide_heads():
    """They leave room for one head's queries beside a tile."""
    case = make_chunk(90, 77, 1, 2, 512, 16)
    assert error(sampled(launchers, case), sampled(reference, case)) < SIXTEEN_BITS


@BOTH
@pytest.mark.parametrize("chunk", [(200, 131), (0, 260)], ids=str)
def test_sample_mass_asks_the_last_of_eight_for_the_largest_of_sixteen(run, chunk):
    case = make_chunk(*chunk, 1, 2, 32, 32)
    keys, _ = keys_and_values(case)
    logits = case.q.double().transpose(0, 1) @ keys.transpose(1, 2) * case.scale
    logits.masked_fill_(~causal_mask(case), float("-inf"))
    logits = torch.nn.functional.pad(logits, (0, -logits.shape[2] % 32), value=float("-inf"))
    shares = logits.unflatten(2, (-1, 16)).amax(3).softmax(2).unflatten(2, (-1, 2)).sum(3)
    masses = sampled(run, case)
    tokens = case.blocks.num_tokens
    for block, part in enumerate(case.blocks.split(1)):
        first, count = block // 2 * 2 * BLOCK_TOKENS, part.num_pages(32)
        asked = [*range(first + 7, min(first + 256, tokens), 8)]
        if tokens < first + 256 and tokens % 8:
            asked.append(tokens - 1)
        assert error(masses[:, block, :count], shares[:, asked, :count].sum(1)) < SIXTEEN_BITS
        assert (masses[:, block, count:] == -1).all()


@pytest.mark.parametrize("times", [1e3, 1e4, 1e5])
def test_sample_mass_of_large_logits(times):
    """What float16 holds to 32 or not at all."""
    case = make_chunk(300, 129, 1, 2, 32, 16)
    case.q *= times
    masses = sampled(launchers, case)
    assert torch.isfinite(masses).all() and (masses[:, 1].sum(-1) - 17).abs().max() < 1e-2


@BOTH
@pytest.mark.parametrize("chunk", [(333, 130), (0, 140)], ids=str)
def test_own_pages_count_in_what_a_row_holds(run, chunk):
    case = make_chunk(*chunk, 1, 2, 32, 16)
    mass = torch.rand(random_keep(case).shape, device=DEVICE) ** 4 + 1e-3
    keep = torch.full_like(random_keep(case), 77)
    run.select_row_pages(mass.log(), case.blocks, 16, 0, 0.8, keep, own_pages=True)
    for row, part in enumerate([*case.blocks.split(1)] * 2):
        before, count = part.first_position // 16, part.num_pages(16)
        kept = keep[row].bool()
        kept[before:count] = True
        held, total = mass[row][kept].sum(), mass[row, :count].sum()
        least = mass[row, :before][kept[:before]].min() if kept[:before].any() else 0
        assert held >= 0.8 * total - 1e-4
        assert kept[:before].sum() <= 1 or held - least < 0.8 * total + 1e-4, "one page less would do"


@pytest.mark.parametrize("sizes", [(3, 0.0), (0, 0.0), (ALL, 0.0), (1, 0.6), (1, 1)], ids=str)
@chunks
def test_select_row_pages_matches_reference(chunk, sizes):
    case = make_chunk(*chunk, 1, 2, 32, 16)
    # Log-masses of powers of two: sums of masses are exact in any order.
    scores = torch.randint(-6, 0, random_keep(case).shape, device=DEVICE) * math.log(2)
    keeps = []
    for run in (reference, launchers):
        keeps.append(torch.full_like(random_keep(case), 77))
        run.select_row_pages(scores.clone(), case.blocks, 16, *sizes, keeps[-1])
    assert torch.equal(*keeps) and (keeps[0] <= 1).all()


PATTERNS = {
    "a_shape": PositionPattern(initial_tokens=40, recent_tokens=70),
    "strided": PositionPattern(recent_tokens=50, stride_tokens=100),
    "dilated": PositionPattern(initial_tokens=20, recent_tokens=100, dilation=3),
    "longformer": PositionPattern(recent_tokens=90, dilation=2, dilated_heads=2),
    "bigbird": PositionPattern(initial_tokens=16, recent_tokens=16, random_tokens=120),
}


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("pattern", PATTERNS)
@chunks
def test_fixed_pattern_matches_reference(chunk, pattern, page_size):
    case = make_chunk(*chunk, 1, 3, 32, page_size)
    expected = torch.full_like(random_keep(case), 77)
    actual = expected.clone()
    for run, keep in ((reference, expected), (launchers, actual)):
        run.position_pattern(PATTERNS[pattern], case.blocks, page_size, keep)
    assert torch.equal(actual, expected) and (expected <= 1).all()


def position_keep(pattern: PositionPattern, case) -> torch.Tensor:
    """bool [q_heads, num_blocks, num_pages]."""
    keep = torch.full_like(random_keep(case), 77)
    reference.position_pattern(pattern, case.blocks, case.page_size, keep)
    return keep.bool().view(case.q_heads, case.blocks.num_blocks, -1)


@chunks
@pytest.mark.parametrize("name", ["a_shape", "strided"])
def test_fixed_pattern_keeps_pages_with_any_token_that_counts(chunk, name):
    case, pattern = make_chunk(*chunk, 1, 1, 32, 16), PATTERNS[name]
    keep = position_keep(pattern, case)[0]
    key = torch.arange(case.num_pages * 16, device=DEVICE)
    for block, part in enumerate(case.blocks.split(1)):
        position = torch.arange(part.first_position, part.end_position, device=DEVICE)[:, None]
        behind = position - key
        counts = (key < pattern.initial_tokens) | (behind < pattern.recent_tokens)
        if pattern.stride_tokens:
            counts |= behind % pattern.stride_tokens == 0
        counts &= behind >= 0
        assert torch.equal(keep[block], counts.any(0).unflatten(0, (-1, 16)).any(1))


def test_dilated_heads_skip_pages_and_reach_farther():
    case = make_chunk(600, 16, 1, 2, 32, 16)
    near, far = position_keep(PATTERNS["longformer"], case)[:, 0]
    assert near.sum() == near[-int(near.sum()) :].sum(), "the undilated window has gaps"
    assert not far[-2] and far[-1] and far[-3]
    assert far.nonzero().min() < near.nonzero().min()


def test_random_pages_are_about_as_many_as_asked_for():
    case = make_chunk(3000, 256, 2, 8, 32, 16)
    drawn = position_keep(PositionPattern(random_tokens=320), case).sum(-1).float()
    assert 15 < drawn.mean() < 25 and drawn.std() > 1, "20 pages on average, drawn anew by block and head"


def test_parts_of_a_chunk_cover_it_in_order():
    chunk = QueryBlocks(3, 40, 1000, 77)
    assert list(chunk.split(100)) == [chunk]
    assert [part.num_blocks for part in chunk.split(1)] == [1] * 8
    assert [part.num_blocks for part in chunk.split(3)] == [2, 2, 2, 2]
    parts = list(chunk.split(7))
    assert [part.num_blocks for part in parts] == [4, 4]
    for before, after in itertools.pairwise(parts):
        assert (after.first_token, after.first_position) == (
            before.first_token + before.num_tokens, before.end_position,
        )  # fmt: skip
    assert parts[-1].end_position == chunk.end_position and parts[0].first_token == 40

"""Sketches of keys: their kernels against the torch references, and what they must hold."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DEVICE, DTYPES, ON_GPU, error, make, poisoned_scores

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.hadamard import hadamard
from vllm_sparse.kernels.reference.sketch_write import sketched_keys
from vllm_sparse.pages.summaries import SKETCH_BITS, SUMMARIES, TILE_TOKENS, SketchLayout, summary_slots

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers

# (kv_heads, group, head_dim, page_size): group 1/3/4/7/8, odd head sizes, pages of several tiles.
SHAPES = [(2, 3, 64, 16), (1, 1, 128, 16), (3, 4, 96, 32), (1, 7, 256, 16), (1, 2, 512, 16), (2, 8, 32, 64)]
LENGTHS = [1, 0, 15, 16, 17, 33, 200, 389]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_group{}_d{}_page{}".format(*shape))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
summaries = pytest.mark.parametrize("summary", SKETCH_BITS)
BOTH_WRITES = pytest.mark.parametrize(
    "write", [reference.page_write, launchers.page_write], ids=["torch", "triton"]
)


def empty_cache(blocks, kv_heads, head_dim, page_size, dtype, summary):
    """Poison, in bytes that are no code, no scale and no mean."""
    rows = page_size + summary_slots(summary, page_size, head_dim, dtype.itemsize)
    return torch.full((blocks, kv_heads, rows, 2 * head_dim), float("nan"), dtype=dtype, device=DEVICE)


def scale_of_logits(case, summary):
    """The largest that a logit of ``case`` can be: the longest query times the longest sketched key."""
    keys = sketched_keys(case.kv, case.page_size, summary)[0].norm(dim=-1).nan_to_num(0.0)
    return (case.scale * case.q.float().norm(dim=-1).max() * keys[keys < 1e4].max()).item()


@summaries
@shapes
@dtypes
def test_scores_match_reference(shape, dtype, summary):
    kv_heads, group, head_dim, page_size = shape
    lengths = [*LENGTHS, 66 * page_size]
    case = make(lengths, kv_heads, group, head_dim, page_size, 4, dtype=dtype, summary=summary)
    q_heads, capacity = case.scores.values.shape
    actual = poisoned_scores(q_heads, capacity, len(case.seq_lens), DEVICE)
    for run, scores in ((reference.sketch_score, case.scores), (launchers.sketch_score, actual)):
        run(case.q, case.kv, case.block_table, case.plan, case.geometry, scores, summary)
    # The kernel rounds each channel of a rotated query to a step, so a logit is off by this much at one sigma.
    step = scale_of_logits(case, summary) / (127 * 128)
    sigma = step * 12**-0.5
    for mine, expected in ((actual.values, case.scores.values), (actual.chunk_lse, case.scores.chunk_lse)):
        assert torch.equal(mine.isnan(), expected.isnan()), "wrote a score that nobody asked for"
        assert torch.equal(mine.isneginf(), expected.isneginf()), "tiles that are not full have no sketch"
        written = mine.isfinite()
        assert written.any()
        assert (mine - expected)[written].abs().max() < 6 * sigma + 1e-5


@summaries
@shapes
@dtypes
def test_page_write_matches_reference_over_chunks(shape, dtype, summary):
    kv_heads, _, head_dim, page_size = shape
    expected = empty_cache(9, kv_heads, head_dim, page_size, dtype, summary)
    actual = expected.clone()
    blocks, written = torch.tensor([7, 2, 5]), 0
    # Chunks that start and end inside pages; a negative one rewrites: a rejected draft.
    for chunk in (1, page_size - 1, page_size + 3, -2, 9):
        start = written + min(chunk, 0)
        positions = torch.arange(start, start + abs(chunk))
        written = start + abs(chunk)
        slots = blocks[positions // page_size] * page_size + positions % page_size
        slots = torch.cat([torch.tensor([-1]), slots, torch.tensor([-1])]).to(DEVICE)
        key, value = torch.randn(2, len(slots) + 2, kv_heads, head_dim, device=DEVICE).to(dtype)
        for write, kv in ((reference.page_write, expected), (launchers.page_write, actual)):
            write(key, value, kv, slots, page_size, summary)
    rows = slice(0, page_size)
    assert torch.equal(actual[:, :, rows].nan_to_num(123.0), expected[:, :, rows].nan_to_num(123.0))
    untouched = [block for block in range(9) if block not in blocks.tolist()]
    assert actual[untouched].isnan().all(), "a block that no slot names was written"
    filled = torch.arange(written // TILE_TOKENS * TILE_TOKENS).split(page_size)
    for block, tokens in zip(blocks.tolist(), filled, strict=False):
        mine, right = (
            sketched_keys(kv[[block]], page_size, summary)[0][:, :, : len(tokens)] for kv in (actual, expected)
        )
        # Rounding may move a code over a threshold, and a mean by one step of 127, but few of them.
        assert error(mine, right) < 1e-2
        assert ((mine - right).abs() > right.abs().max() / 50).float().mean() < 1e-3


@summaries
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_sketched_keys_are_close_and_rotated(summary, head_dim):
    """The share of a residual that is lost: 1 - 2 / pi of its square with one bit, 0.119 with two."""
    key = torch.randn(64, 2, head_dim, device=DEVICE) + 3 * torch.randn(1, 2, head_dim, device=DEVICE)
    kv = empty_cache(2, 2, head_dim, 32, torch.float32, summary)
    reference.page_write(key, key, kv, torch.arange(64, device=DEVICE), 32, summary)
    sketched = sketched_keys(kv, 32, summary)[0].transpose(1, 2).flatten(0, 1)
    exact = hadamard(torch.nn.functional.pad(key, (0, sketched.shape[-1] - head_dim)))
    assert error(exact.square().sum(-1), key.square().sum(-1)) < 1e-5, "the rotation changes lengths"
    mean = exact.unflatten(0, (4, 16)).mean(1, keepdim=True)
    residual = exact.unflatten(0, (4, 16)) - mean
    lost = ((sketched - exact).square().sum() / residual.square().sum()).item()
    expected = 1 - 2 / torch.pi if summary == "sketch1" else 0.1188
    assert abs(lost - expected) < 0.04


@summaries
def test_the_noise_of_codes_is_what_they_lose(summary):
    key = torch.randn(640, 1, 128, device=DEVICE)
    kv = empty_cache(40, 1, 128, 16, torch.float32, summary)
    reference.page_write(key, key, kv, torch.arange(640, device=DEVICE), 16, summary)
    sketched, scale = (x[:, 0].flatten(0, 1) for x in sketched_keys(kv, 16, summary))
    lost = (sketched - hadamard(key[:, 0])).square().mean(-1)
    assert abs((lost / scale.square()).mean() - SketchLayout.of(summary, 128).noise) < 0.003


@summaries
@pytest.mark.parametrize("keys", ["zero", "tiny", "constant", "outlier"])
def test_sketches_of_odd_keys_are_finite(summary, keys):
    key = torch.randn(32, 1, 64, device=DEVICE)
    if keys == "outlier":
        key[3] *= 1e3
    elif keys == "constant":
        key = key[:1].expand(32, -1, -1).contiguous()
    else:
        key = key * (0.0 if keys == "zero" else 1e-12)
    for write in (reference.page_write, launchers.page_write):
        kv = empty_cache(2, 1, 64, 16, torch.float32, summary)
        write(key, key, kv, torch.arange(32, device=DEVICE), 16, summary)
        sketched = sketched_keys(kv, 16, summary)[0][:, 0].flatten(0, 1)
        assert sketched.isfinite().all()
        if keys == "constant":
            assert error(sketched, hadamard(key[:, 0])) < 0.01


@summaries
@pytest.mark.parametrize("size", [30, 1e4])
def test_a_key_far_from_the_others_wins_and_stays_finite(summary, size):
    """Past what float32 can add to a page's centre it counts as much as that allows."""
    case = make([160], 2, 3, 64, 16, 8, summary=summary, seed=3)
    block = int(case.block_table[0, 3])
    heads = case.q[0].view(2, 3, 64)
    key = torch.randn(16, 2, 64, device=DEVICE)
    key[5] = heads[:, 0] * size
    reference.page_write(key, key, case.kv, torch.arange(block * 16, block * 16 + 16, device=DEVICE), 16, summary)
    found = poisoned_scores(6, case.scores.capacity_pages, 1, DEVICE)
    launchers.sketch_score(case.q, case.kv, case.block_table, case.plan, case.geometry, found, summary)
    scores = found.values[:, :10]
    assert scores.isfinite().all() and found.chunk_lse[:, 0].isfinite().all()
    assert scores.view(2, 3, 10)[:, 0].argmax(-1).tolist() == [3, 3]


@pytest.mark.parametrize("summary", ["key_range", *SKETCH_BITS])
def test_a_page_is_read_once_its_request_has_filled_it(summary):
    """What a reused block holds before, its last owner's sketch included, does not count."""
    case = make([161, 64], 2, 3, 64, 32, 2, summary=summary, seed=1)
    score = launchers.range_score if summary == "key_range" else partial(launchers.sketch_score, summary=summary)
    scores = []
    for stale in (0.0, 50.0, float("nan")):
        kv = case.kv.clone()
        last = int(case.block_table[0, 5])
        keys = torch.full((32, 2, 64), stale, device=DEVICE)
        first = case.kv[last, :, :1, :64].transpose(0, 1)
        slots = torch.arange(last * 32, last * 32 + 32, device=DEVICE)
        reference.page_write(keys, keys, kv, slots, 32, summary)
        reference.page_write(first, first, kv, slots[:1], 32, summary)
        out = poisoned_scores(6, case.scores.capacity_pages, 2, DEVICE)
        score(case.q, kv, case.block_table, case.plan, case.geometry, out)
        scores.append(out)
    assert scores[0].values[:, :5].isfinite().all() and scores[0].values[:, 5].isneginf().all()
    assert scores[0].chunk_lse[:, 0].isfinite().all()
    for other in scores[1:]:
        assert torch.equal(other.values[:, :6], scores[0].values[:, :6])
        assert torch.equal(other.chunk_lse[:, 0], scores[0].chunk_lse[:, 0])


@BOTH_WRITES
@pytest.mark.parametrize("summary", ["key_range", *SKETCH_BITS])
def test_the_token_that_completes_a_page_writes_its_summary(write, summary):
    """Token by token, and taken back in between, as in one write; none before the last row."""
    key = torch.randn(16, 2, 64, device=DEVICE)
    slots = torch.arange(16, 32, device=DEVICE)
    expected, found = (empty_cache(2, 2, 64, 16, torch.float32, summary) for _ in range(2))
    write(key, key, expected, slots, 16, summary)
    for place in [*range(15), 13, 14]:
        one = slice(place, place + 1)
        write(key[one], key[one], found, slots[one], 16, summary)
        assert found[1, :, 16:].isnan().all()
    # Three drafts complete the page with other keys, and are rejected.
    write(2 * key[13:], key[13:], found, slots[13:], 16, summary)
    for place in (13, 14, 15):
        assert not torch.equal(*(kv.view(torch.int8) for kv in (found, expected)))
        one = slice(place, place + 1)
        write(key[one], key[one], found, slots[one], 16, summary)
    assert torch.equal(*(kv.view(torch.int8) for kv in (found, expected)))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs more memory than a CPU test should take")
def test_offsets_past_int32():
    """A cache of more than 2**31 elements, used at its far end."""
    heads, page, head_dim, summary = 8, 16, 128, "sketch2"
    rows = page + summary_slots(summary, page, head_dim, 2)
    blocks = 2**32 // (heads * rows * 2 * head_dim)
    kv = torch.empty(blocks, heads, rows, 2 * head_dim, dtype=torch.bfloat16, device=DEVICE)
    far = torch.arange(blocks - 40, blocks, device=DEVICE)
    slots = (far[:, None] * page + torch.arange(page, device=DEVICE)).flatten()[:-3]
    key, value = torch.randn(2, len(slots), heads, head_dim, device=DEVICE).bfloat16()
    launchers.page_write(key, value, kv, slots, page, summary)
    case = make([len(slots)], heads, 4, head_dim, page, 8, dtype=torch.bfloat16, summary=summary)
    actual = poisoned_scores(case.scores.q_heads, case.scores.capacity_pages, 1, DEVICE)
    args = (case.q, kv, far[None].int(), case.plan, case.geometry)
    launchers.sketch_score(*args, actual, summary)
    reference.sketch_score(*args, case.scores, summary)
    assert error(actual.values[:, :40], case.scores.values[:, :40]) < 1e-4


def test_summaries_take_the_rows_they_need():
    assert [summary_slots(summary, 16, 128, 2) for summary in SUMMARIES] == [0, 1, 1, 2]
    assert [summary_slots("sketch2", page, 128, 2) for page in (32, 64, 256)] == [3, 6, 22]
    assert summary_slots("sketch2", 16, 64, 4) == 1
    assert SketchLayout.of("sketch2", 96).width == 128
    with pytest.raises(ValueError, match="summary 'sketch3'; allowed: none, key_range, sketch1, sketch2"):
        summary_slots("sketch3", 16, 128, 2)

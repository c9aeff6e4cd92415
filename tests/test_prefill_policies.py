"""Every prefill policy through the whole of SparsePrefill: estimate, choice, page table, attention kernel."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, ON_GPU, TOLERANCE, error
from prefill_cases import attention_weights, causal_mask, make_chunk, masked_attention, poison, table_mask

from vllm_sparse import kernels
from vllm_sparse.attention.torch_attn import TorchAttention
from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.pages.sample import sample_room
from vllm_sparse.policies import PREFILL_POLICIES
from vllm_sparse.prefill import gate as chunk_gate
from vllm_sparse.prefill.attend import SparsePrefill, plan_chunks
from vllm_sparse.prefill.gate import ChunkGate

CHOOSING = [name for name in PREFILL_POLICIES if name not in ("auto", "dense")]
ESTIMATING = ["vertical_slash", "block_sparse", "xattention", "flex_prefill", "sampled_queries"]
FIXED = {name: {"slash_tokens": 800} if name == "strided" else {} for name in CHOOSING if name not in ESTIMATING}
"""Policies by position alone, and sizes at which chunks of a few blocks leave pages out."""
policies = pytest.mark.parametrize("policy", CHOOSING)
SIZES = {"prefill_top_p": 0, "vertical_tokens": 48, "slash_tokens": 64}


class Recording(TorchAttention):
    """The torch attention kernel, keeping the mask of each table that it was given."""

    def __init__(self, case):
        self.case, self.masks, self.first = case, [], case.blocks.first_position

    def attend_blocks(self, q, kv, table, geometry, out, scratch):
        part = QueryBlocks(0, 0, len(q), self.first)
        self.first += len(q)
        whole, self.case.blocks = self.case.blocks, part
        mask = table_mask(self.case, table)
        self.case.blocks = whole
        pad = whole.end_position - part.end_position
        self.masks.append(torch.nn.functional.pad(mask, (0, pad)))
        super().attend_blocks(q, kv, table, geometry, out, scratch)


def policy_of(config: SparseConfig, case):
    patterns = HeadPatterns.of([config.uniform_pattern] * case.q_heads, case.page_size, DEVICE)
    return config.new_prefill_policy(case.page_size, patterns)


def sparse_of(case, policy: str, kernel, **settings) -> SparsePrefill:
    config = SparseConfig(prefill_policy=policy, sink_tokens=16, window_tokens=32, **{**SIZES, **settings})
    return SparsePrefill(
        policy_of(config, case), kernel, case.buffers, config.selection(case.page_size), case.geometry
    )


def attend(case, policy: str, **settings):
    """Output, and bool [q_heads, num_tokens, context tokens] of what was attended."""
    kernel = Recording(case)
    sparse = sparse_of(case, policy, kernel, **settings)
    poison(case.buffers)
    out = torch.full_like(case.q, float("nan"))
    sparse.attend(case.q, case.kv, case.block_table[None], case.blocks, out)
    return out, torch.cat(kernel.masks, 1)


@policies
@pytest.mark.parametrize("chunk", [(0, 200), (700, 300), (333, 129)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_attends_causally_with_sinks_and_window(policy, chunk, page_size):
    case = make_chunk(*chunk, 2, 2, 32, page_size)
    out, mask = attend(case, policy)
    assert error(out, masked_attention(case, mask)) < TOLERANCE[torch.float32]
    causal = causal_mask(case)
    assert not (mask & ~causal).any()
    position = case.blocks.first_position + torch.arange(case.blocks.num_tokens, device=DEVICE)[:, None]
    key = torch.arange(case.blocks.end_position, device=DEVICE)
    always = (key < 16) | (position - key < 32)
    assert mask[:, always & causal].all()
    attended, pairs = case.buffers.counters.tolist()
    assert (attended, pairs) == (mask.sum(), case.q_heads * causal.sum())


@policies
def test_sizes_cover_context(policy):
    case = make_chunk(300, 200, 1, 2, 32, 16)
    sizes = [{"slash_tokens": 10**6}]
    if policy in ESTIMATING:
        sizes.append({"prefill_top_p": 1, "vertical_tokens": 0})
    for settings in sizes:
        _, mask = attend(case, policy, **{"vertical_tokens": 10**6, **settings})
        assert torch.equal(mask, causal_mask(case).expand_as(mask))


@policies
def test_parts_attend_as_the_whole_chunk(policy):
    case = make_chunk(300, 500, 1, 2, 32, 16, seed=3)
    whole, mask = attend(case, policy)
    assert case.buffers.blocks_at_once(case.blocks) == 4
    case.buffers.max_blocks = 2
    parts, parts_mask = attend(case, policy)
    assert torch.equal(mask, parts_mask)
    assert error(parts, whole) < 1e-6


@policies
def test_small_sizes_leave_pages_out(policy):
    case = make_chunk(1900, 130, 1, 4, 32, 16)
    _, mask = attend(case, policy, slash_tokens=300 if policy == "strided" else 64)
    assert 0.02 < mask.sum() / (case.q_heads * causal_mask(case).sum()) < 0.8


@policies
@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels anyway")
def test_kernels_choose_as_references(policy, monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels import launchers

    case = make_chunk(411, 270, 1, 3, 32, 16, seed=5)
    expected, expected_mask = attend(case, policy)
    monkeypatch.setattr(kernels, "for_device", lambda device: launchers)
    out, mask = attend(case, policy)
    assert torch.equal(mask, expected_mask)
    assert error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("policy", FIXED)
@pytest.mark.parametrize("chunk", [(1904, 136), (1500, 520), (333, 129), (15, 300)], ids=str)
@pytest.mark.parametrize(("page_size", "q_heads"), [(16, 1), (16, 4), (64, 3)])
def test_pages_in_reach(policy, chunk, page_size, q_heads):
    """Pages in reach are those that a chunk attends."""
    case = make_chunk(*chunk, 1, q_heads, 32, page_size)
    _, mask = attend(case, policy, **FIXED[policy])
    before = case.blocks.first_position // page_size
    attended = mask.any(0).any(0)[: before * page_size].view(before, page_size).any(1)
    reached = sparse_of(case, policy, None, **FIXED[policy]).pages_in_reach(case.blocks)
    assert reached.tolist() == attended.nonzero().squeeze(1).tolist()
    if chunk[0] > 1000 and page_size == 16 and (policy != "bigbird" or q_heads == 1):
        assert 0 < len(reached) < before


@pytest.mark.parametrize("policy", ESTIMATING)
def test_policies_that_read_keys_reach_everything(policy):
    case = make_chunk(700, 300, 1, 2, 32, 16)
    assert sparse_of(case, policy, None).pages_in_reach(case.blocks) is None


def test_a_shape_reads_little():
    """At default sizes ``a_shape`` reads little of a long context."""
    case, config = make_chunk(0, 16, 1, 2, 32, 16), SparseConfig()
    sizes = {"vertical_tokens": config.vertical_tokens, "slash_tokens": config.slash_tokens}
    reached = sparse_of(case, "a_shape", None, **sizes).pages_in_reach(QueryBlocks(0, 0, 8192, 122_880))
    assert reached.tolist() == [*range(64), *range(7552, 7680)]


def test_many_random_pages_are_all_in_reach():
    """Random pages too many to draw on the host are all in reach."""
    case = make_chunk(0, 16, 1, 2, 32, 16)
    chunk = QueryBlocks(0, 0, 8192, 122_880)
    for slash_tokens, left_out in ((0, True), (16, False)):
        reached = sparse_of(case, "bigbird", None, slash_tokens=slash_tokens).pages_in_reach(chunk)
        assert (len(reached) < 10) == left_out and (len(reached) == 7680) != left_out


@pytest.mark.parametrize("policy", FIXED)
@pytest.mark.parametrize("runs", ["references", "kernels"])
def test_unreached_pages_touch_no_output(policy, runs, monkeypatch):
    """With offload the buffer holds anything there: neither K nor V of it may be looked at."""
    kernel = TorchAttention()
    if runs == "kernels":
        pytest.importorskip("triton")
        from vllm_sparse.attention.triton_attn import TritonAttention
        from vllm_sparse.kernels import launchers

        monkeypatch.setattr(kernels, "for_device", lambda device: launchers)
        kernel = TritonAttention()
    case = make_chunk(1500, 270, 1, 3, 32, 16, seed=6)
    sparse = sparse_of(case, policy, kernel, **FIXED[policy])
    outs = [torch.full_like(case.q, float("nan")) for _ in range(2)]
    sparse.attend(case.q, case.kv, case.block_table[None], case.blocks, outs[0])
    unread = torch.ones(case.blocks.first_position // 16, dtype=torch.bool)
    unread[sparse.pages_in_reach(case.blocks).long()] = False
    assert unread.any()
    case.kv[case.block_table[: len(unread)][unread.to(DEVICE)].long()] = float("nan")
    sparse.attend(case.q, case.kv, case.block_table[None], case.blocks, outs[1])
    assert torch.equal(*outs) and not outs[0].isnan().any()


@policies
def test_warm_up_leaves_no_trace(policy):
    case = make_chunk(300, 200, 1, 2, 32, 16)
    config = SparseConfig(prefill_policy=policy)
    sparse = SparsePrefill(
        policy_of(config, case), TorchAttention(), case.buffers, config.selection(16), case.geometry
    )
    sparse.warm_up(17, torch.float32, torch.float32)
    assert case.buffers.counters.tolist() == [0, 0]
    assert not (case.buffers.lengths == 2**30).all(), "nothing ran"


def test_vertical_slash_finds_column_and_diagonal():
    """A column and a diagonal that were put there are found."""
    case = make_chunk(1000, 280, 1, 1, 32, 16, seed=1)
    # Every query wants the keys of page 20 and the key 500 tokens before it.
    kv, page = case.kv, case.page_size
    content = torch.nn.functional.normalize(torch.randn(1280, 32, device=DEVICE), dim=1) * 6
    column = torch.nn.functional.normalize(torch.randn(32, device=DEVICE), dim=0) * 6
    content[320:336] = column
    kv[case.block_table[:80].long(), 0, :page, :32] = content.unflatten(0, (80, page))
    position = case.blocks.first_position + torch.arange(280, device=DEVICE)
    case.q = (content[position - 500] + column)[:, None] * 3
    _, mask = attend(
        case,
        "vertical_slash",
        vertical_tokens=16,
        slash_tokens=128,
    )
    query = torch.arange(280, device=DEVICE)
    assert mask[0, query, position - 500].all(), "the diagonal was lost"
    assert mask[0][:, 320:336].all(), "the column was lost"
    assert (attention_weights(case) * mask).sum(-1).mean() > 0.9
    assert mask.sum() < 0.7 * causal_mask(case).sum()


def two_kinds_of_head(page_size: int):
    """A chunk of two blocks over one KV head, whose first query head is query-aware and second is not.

    Each block of head 0 prefers pages of its own. Keys are almost alike in every 128, as are a block's queries:
    means foretell its attention. Head 1 wants the key 532 tokens before each query, which means wash out; the
    probe's lie in several pages, so that no page holds what their band does.
    """
    case = make_chunk(1000, 256, 1, 2, 64, page_size, seed=2)
    kv, end, pages = case.kv, case.blocks.end_position, case.num_pages
    likes = torch.linspace(-2, 2, 10, device=DEVICE)[torch.randperm(10)].repeat_interleave(128 // page_size)
    likes = likes[:pages] + torch.linspace(0, 0.05, pages, device=DEVICE)
    likes = torch.stack([likes, -likes])
    likes[:, 896 // page_size :] = -9
    keys = torch.zeros(pages * page_size, 64, device=DEVICE)
    keys[:, :2] = likes.T.repeat_interleave(page_size, 0)
    keys[:, 32:] = torch.nn.functional.normalize(torch.randn(len(keys), 32, device=DEVICE), dim=1)
    position = torch.arange(1000, end, device=DEVICE)
    case.q = torch.zeros_like(case.q)
    case.q[:128, 0, 0] = case.q[128:, 0, 1] = 2 / case.scale
    case.q[:, 1, 32:] = keys[position - 532, 32:] * 30 / case.scale
    keys[end:] = float("nan")
    kv[case.block_table[:pages].long(), 0, :page_size, :64] = keys.unflatten(0, (pages, page_size))
    return case, likes


@pytest.mark.parametrize("runs", ["references", "kernels"])
@pytest.mark.parametrize(("page_size", "top_p"), [(16, 0), (64, 0.9)])
def test_flex_prefill_by_head(runs, page_size, top_p, monkeypatch):
    if runs == "kernels":
        pytest.importorskip("triton")
        from vllm_sparse.kernels import launchers

        monkeypatch.setattr(kernels, "for_device", lambda device: launchers)
    case, likes = two_kinds_of_head(page_size)
    settings = {"prefill_top_p": top_p, "vertical_tokens": 0, "slash_tokens": page_size}
    _, mask = attend(case, "flex_prefill", **settings)
    assert case.buffers.query_aware.tolist() == [1, 0]
    position = torch.arange(1000, 1256, device=DEVICE)[:, None]
    key = torch.arange(1256, device=DEVICE)
    pages, causal = key // page_size, key <= position
    band = (position - key) // page_size == 532 // page_size
    expected = torch.zeros_like(mask)
    for block, start in enumerate((1000, 1128)):
        rows = slice(128 * block, 128 * block + 128)
        always = (pages == 0) | (pages >= (start - 31) // page_size)
        share = (2 * likes[block, : start // page_size]).double().softmax(0)
        ordered = share.sort(descending=True)
        wanted = int((ordered.values.cumsum(0) < top_p).sum()) + 1
        expected[0, rows] = torch.isin(pages, ordered.indices[:wanted]) | always
        expected[1, rows] = torch.isin(pages, pages.expand_as(band)[rows][band[rows]]) | always
    expected &= causal
    assert torch.equal(mask, expected)
    for other, head in (("vertical_slash", 1), ("block_sparse", 0)):
        _, alone = attend(case, other, **settings)
        assert torch.equal(alone[head], expected[head]) and not torch.equal(alone[1 - head], expected[1 - head])


def test_sparse_chunks_are_long():
    """Chunks that run sparse are long and of long contexts."""
    starts, lens = [0, 1, 2, 402, 530, 658, 787], [9000, 50, 9000, 9000, 9129, 9129]
    chunks = plan_chunks(starts, lens, 9000, first_request=2)
    assert chunks == [QueryBlocks(5, 658, 129, 9000)]
    assert [chunk.request for chunk in plan_chunks(starts, lens, 400, 2)] == [2, 5]


def test_gate_sorts_chunks_by_their_length_and_the_density_of_those_before(monkeypatch):
    case = make_chunk(300, 200, 1, 2, 32, 16)
    counters, chunk = case.buffers.counters.zero_(), case.blocks
    assert chunk.pairs == causal_mask(case).sum()
    gate, looks = ChunkGate(case.buffers), case.buffers.looks.zero_()
    assert gate.sort([chunk]) == ([], []), "a tiny chunk costs its launches"
    monkeypatch.setattr(chunk_gate, "LEAST_PRODUCTS", 2 * 32 * chunk.pairs - 1)
    less = QueryBlocks(1, 0, 199, 300)
    assert gate.sort([less, chunk]) == ([chunk], [])
    longer = [QueryBlocks(request, 0, 200, 300 + request) for request in range(1, 6)]
    assert gate.sort([chunk, *longer])[0] == longer[-chunk_gate.MOST_CHUNKS :], "those that gain most"

    def count(totals, attended):
        totals += torch.tensor([attended, 100], device=DEVICE)
        synchronize()
        if ON_GPU:
            gate.sort([chunk])  # what is known is of the step before
            synchronize()

    count(counters, 59)
    assert gate.sort([chunk]) == ([chunk], []), "nothing was dense"
    for totals in (counters, looks):
        count(totals, 61)
        rests = [gate.sort([chunk]) == ([], []) for _ in range(chunk_gate.REST_STEPS)]
        assert sum(rests) >= chunk_gate.REST_STEPS - 2
        synchronize()
        assert gate.sort([less, chunk, longer[0]]) == ([], [longer[0]]), "and then it looks, and attends to all"
        assert gate.sort([chunk], can_look=False) == ([chunk], [])
    counters.zero_()  # as metrics do between runs
    synchronize()
    assert gate.sort([chunk]) == ([], [chunk])
    count(looks, 10)
    for _ in range(2):
        assert gate.sort([chunk]) == ([chunk], [])


def test_a_look_counts_what_a_chunk_would_attend_to():
    case = make_chunk(600, 300, 2, 2, 32, 16)
    sparse = sparse_of(case, "sampled_queries", TorchAttention(), prefill_top_p=0.5)
    counters, looks, table = case.buffers.counters.zero_(), case.buffers.looks.zero_(), case.block_table[None]
    sparse.look(case.q, case.kv, table, case.blocks)
    assert counters.tolist() == [0, 0] and 0 < looks[0] < looks[1] == case.q_heads * case.blocks.pairs
    sparse.attend(case.q, case.kv, table, case.blocks, torch.empty_like(case.q))
    assert torch.equal(counters, looks)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def test_buffers_stay_within_256_mib():
    """Buffers stay within 256 MiB at any context."""
    from vllm_sparse.prefill.buffers import PrefillBuffers

    for heads, head_dim in ((32, 128), (64, 128), (16, 256), (8, 64)):
        for context in (32 << 10, 128 << 10, 512 << 10, 1 << 20):
            buffers = PrefillBuffers.allocate(
                heads, head_dim, 16, context, 16384, torch.bfloat16, torch.device("meta")
            )  # fmt: skip
            assert buffers.num_bytes <= 256 << 20, (heads, head_dim, context, buffers.num_bytes >> 20)
            chunk = QueryBlocks(0, 0, 8192, context - 8192)
            part = next(chunk.split(buffers.blocks_at_once(chunk)))
            assert buffers.table(part).head_pages.shape == buffers.keep_mask(part).shape
            assert buffers.scratch.numel() >= 16 * sample_room(context + 64), "no room for a program's logits"
            assert buffers.probe_masses(chunk).numel() > 0

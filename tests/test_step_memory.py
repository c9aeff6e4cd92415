"""What a step allocates beside its planned buffers: nothing in prefill, in decode what is bounded and measured."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from allocations import Allocations
from cases import DEVICE, ON_GPU, TOLERANCE, error, in_float64
from prefill_cases import make_chunk, random_keep

from vllm_sparse import kernels
from vllm_sparse.attention import fa3_attn
from vllm_sparse.attention.torch_attn import TorchAttention
from vllm_sparse.backend import prefill_rows
from vllm_sparse.backend.metadata import Step
from vllm_sparse.config import SparseConfig
from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.layout import single_head_pages
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS, QueryBlocks
from vllm_sparse.pages.selection import Selection
from vllm_sparse.policies import DECODE_POLICIES, PREFILL_POLICIES
from vllm_sparse.prefill.attend import SparsePrefill
from vllm_sparse.prefill.buffers import PrefillBuffers

KV_HEADS, GROUP, HEAD_DIM, PAGE = 2, 4, 64, 16
Q_HEADS = KV_HEADS * GROUP
GEOMETRY = Geometry(Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, 0.1)
CONTEXT, CHUNK = 65536, 16384
cpu_only = pytest.mark.skipif(ON_GPU, reason="a GPU shows it itself: tests/test_gpu_memory.py")


def fake_fa3(attend) -> fa3_attn.FA3Attention:
    """The attention kernel around ``attend`` in place of FlashAttention."""
    kernel = fa3_attn.FA3Attention.__new__(fa3_attn.FA3Attention)
    kernel._attend, kernel._starts = attend, torch.arange(4097, dtype=torch.int32, device=DEVICE)
    return kernel


def varlen_attention(seen: list[dict]):
    """FlashAttention over page tables in plain torch; keeps its arguments in ``seen``."""

    def attend(q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, out=None, **others):
        seen.append(dict(q=q, cu_seqlens_q=cu_seqlens_q, **others))
        out = torch.zeros_like(q) if out is None else out
        assert others["causal"] and others["fa_version"] == 3
        for row, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
            length = int(seqused_k[row])
            if not length:
                continue
            head_pages = block_table[row, : -(-length // k.shape[1])].long()
            keys, values = (x[head_pages].flatten(0, 1)[:length, 0].double() for x in (k, v))
            logits = q[start:end].double() @ keys.T * softmax_scale
            queries = torch.arange(end - start, device=q.device)[:, None, None]
            unseen = torch.arange(length, device=q.device) > length - (end - start) + queries
            out[start:end] = (logits.masked_fill(unseen, float("-inf")).softmax(-1) @ values).to(out.dtype)
        return out

    return attend


@pytest.mark.parametrize("run", ["reference", "kernel"])
@pytest.mark.parametrize(("first", "tokens"), [(0, 128), (37, 200), (333, 130), (256, 1), (100, 513)])
def test_a_table_says_where_the_queries_of_each_block_begin(run, first, tokens):
    if run == "kernel":
        pytest.importorskip("triton")
        from vllm_sparse.kernels import launchers as run
    else:
        run = reference
    case = make_chunk(first, tokens, KV_HEADS, 2, 32)
    table = case.buffers.table(case.blocks)
    run.prefill_table(
        random_keep(case),
        case.block_table,
        case.blocks,
        case.kv,
        Selection(PAGE, 1, 1, 40),
        case.buffers.counters,
        table,
    )
    starts = [head * tokens + block for head in range(case.q_heads) for block in range(0, tokens, BLOCK_TOKENS)]
    assert table.starts.tolist() == [*starts, case.q_heads * tokens]


@pytest.mark.parametrize(("first", "tokens"), [(37, 300), (700, 128), (900, 131)])
def test_fa3_gets_the_blocks_of_each_head_in_turn(first, tokens):
    case, seen = make_chunk(first, tokens, KV_HEADS, 3, 32), []
    table = case.buffers.table(case.blocks)
    reference.prefill_table(
        random_keep(case), case.block_table, case.blocks, case.kv, Selection(PAGE, 1, 1, 40),
        case.buffers.counters, table,
    )  # fmt: skip
    out, expected = torch.full_like(case.q, 7.0), torch.empty_like(case.q, dtype=torch.float64)
    scratch = torch.full((2, case.q.numel() + 5), float("nan"), dtype=case.q.dtype, device=DEVICE)
    fake_fa3(varlen_attention(seen)).attend_blocks(case.q, case.kv, table, case.geometry, out, scratch)
    reference.sparse_prefill(case.q.double(), in_float64(case.kv), table, case.geometry, expected)
    assert error(out, expected) < TOLERANCE[torch.float32]
    (call,) = seen
    assert call["cu_seqlens_q"].data_ptr() == case.buffers.starts.data_ptr(), "starts were copied"
    assert call["q"].data_ptr() == scratch.data_ptr() and call["max_seqlen_q"] == min(tokens, BLOCK_TOKENS)


def test_parts_of_split_rows_never_outgrow_their_bound():
    for queries, head_dim, tokens in itertools.product(
        (1, 32, 4096, 4096 + 32, 1 << 15, 1 << 17, 1 << 20),
        (64, 96, 128, 256),
        (16, 512, 513, 2048, 65536, 1 << 20),
    ):
        splits = fa3_attn.most_splits(queries, head_dim, tokens)
        assert 1 <= splits <= 128 and splits <= max(1, -(-tokens // 128))
        assert splits == 1 or splits * queries * 4 * (head_dim + 1) <= fa3_attn.PARTS_BYTES
    # The call that once took 5.54 GiB: 31 blocks of 32 heads.
    assert fa3_attn.most_splits(31 * 128 * 32, 128, 65536) == 1
    # A decode step of one request, and a short last chunk, still fill a GPU.
    assert fa3_attn.most_splits(32, 128, 2048) == 16
    assert fa3_attn.most_splits(2 * 128 * 32, 128, 65536) * 2 * 32 > 264


@pytest.fixture
def host_code(monkeypatch):
    """Triton launchers on a CPU whose kernels do nothing."""
    if ON_GPU:
        pytest.skip("kernels would run")
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from vllm_sparse.kernels import launchers

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **settings: None)
    monkeypatch.setattr(kernels, "for_device", lambda device: launchers)
    return launchers


def settings(**changes) -> SparseConfig:
    return SparseConfig.from_mapping({"budget_tokens": 2048, **changes}, "a test")


@cpu_only
@pytest.mark.parametrize("top_p", [0, 0.9])
@pytest.mark.parametrize("name", [name for name in PREFILL_POLICIES if name != "dense"])
def test_a_chunk_allocates_nothing_and_waits_for_nothing(host_code, name, top_p):
    """Host code of estimate, choice, table and attention, over 16,384 queries that end a context of 65,536."""
    config = settings(prefill_policy=name, prefill_top_p=top_p)
    buffers = PrefillBuffers.allocate(Q_HEADS, HEAD_DIM, PAGE, CONTEXT, CHUNK, torch.float16, DEVICE)
    buffers.scratch = torch.empty(2, 1 << 23, dtype=torch.float16)  # a CPU allocates none
    q = torch.empty(CHUNK, Q_HEADS, HEAD_DIM, dtype=torch.float16)
    kv = torch.zeros(1, KV_HEADS, PAGE + 1, 2 * HEAD_DIM, dtype=torch.float16)
    patterns = HeadPatterns.of([config.uniform_pattern] * Q_HEADS, PAGE, DEVICE)
    calls = []
    sparse = SparsePrefill(
        config.new_prefill_policy(PAGE, patterns),
        fake_fa3(lambda **given: calls.append(given)),
        buffers,
        config.selection(PAGE),
        GEOMETRY,
    )
    table = torch.zeros(1, CONTEXT // PAGE, dtype=torch.int32)
    with Allocations() as seen:
        sparse.attend(q, kv, table, QueryBlocks(0, 0, CHUNK, CONTEXT - CHUNK), q)
    assert calls and seen.made == [] and seen.waits == []


@dataclass
class Scheduled:
    """What a step of vLLM tells of itself, as far as the builder of offloaded prefill reads it."""

    num_reqs: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    num_actual_tokens: int = 0
    max_query_len: int = 1
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    mm_req_doc_ranges: dict | None = None

    def __post_init__(self):
        self.query_start_loc_cpu = self.query_start_loc

    def replace(self, **changes):
        return replace(self, **{name: value for name, value in changes.items() if name != "query_start_loc_cpu"})


def test_tables_of_an_offloaded_prefill_are_bounded_and_hits_on_this_step_are_found(monkeypatch):
    """One long context beside many short ones would make a table of their product."""
    pytest.importorskip("vllm")

    monkeypatch.setattr(prefill_rows, "MOST_TABLE_ENTRIES", 1000)
    contexts, queries = [3000, *[40] * 60, 3000, *[40] * 60], 20
    pages = [-(-n // PAGE) for n in contexts]
    table = torch.zeros(len(contexts), max(pages), dtype=torch.int32)
    for row, count in enumerate(pages):
        table[row, :count] = torch.arange(sum(pages[:row]), sum(pages[: row + 1]), dtype=torch.int32)
    table[5, 0], table[9, 0] = table[3, 2], table[0, 187]  # pages that others write in this step
    common = Scheduled(
        len(contexts), torch.arange(0, queries * len(contexts) + 1, queries), torch.tensor(contexts), table,
        torch.zeros(queries * len(contexts), dtype=torch.int64),
        seq_lens_cpu_upper_bound=torch.tensor(contexts),
    )  # fmt: skip
    builder = SimpleNamespace(build=lambda rows, common, fast_build: rows)
    step, config = Step(common, 0, len(contexts), 0), settings(prefill_policy="dense")
    runs = prefill_rows.context_runs(step, config, PAGE, 4096, builder, None)
    assert runs[0].tokens.start == 0 and runs[-1].tokens.stop == queries * len(contexts)
    assert all(a.tokens.stop == b.tokens.start for a, b in itertools.pairwise(runs))
    for run in runs:
        assert len(run.block_table) == 1 or run.block_table.numel() <= 1000
    written = {
        int(block) for row, n in enumerate(contexts) for block in table[row, (n - queries) // PAGE : pages[row]]
    }
    found = torch.cat([run.late_places >= 0 for run in runs]).tolist()
    blocks = torch.cat([run.old_blocks for run in runs]).tolist()
    assert found == [block in written for block in blocks] and sum(found) == 2


def test_decode_rows_beside_prefill_are_built_as_stock_builds_a_mixed_step():
    """FlashAttention splits rows of one query as if it had the GPU's memory for itself; within graphs 32 times."""
    pytest.importorskip("vllm")
    from vllm_sparse.backend import dense

    class Builder:
        def __init__(self, *args):
            self.use_full_cuda_graph, self.aot_sliding_window = True, None

        def build(self, prefix, common, fast_build):
            return self, common

    backend = SimpleNamespace(get_builder_cls=lambda: Builder)
    builder = dense.DenseBuilder(None, [], None, DEVICE, backend, "auto")
    made = {rows: builder.build(rows, None)[0] for rows in ("all", "prefill", "short", "eager")}
    assert len(set(map(id, made.values()))) == 4, "two kinds of rows share one buffer of scheduling data"
    assert [each.use_full_cuda_graph for each in made.values()] == [True, True, True, False]
    assert all(each.aot_sliding_window == (-1, -1) for each in made.values())
    starts, ones = torch.tensor([0, 1, 2, 300]), torch.ones(3, 4, dtype=torch.int32)
    common = Scheduled(3, starts, torch.tensor([50, 60, 298]), ones, torch.zeros(300), 300, 298)
    rows = dense.decode_rows(common, 2, 2)
    assert (rows.num_reqs, rows.num_actual_tokens, rows.max_query_len) == (2, 2, 298)


def workspace_of(config: SparseConfig, max_model_len: int = 131072, max_num_seqs: int = 32):
    pytest.importorskip("vllm")
    from vllm_sparse.backend.workspace import Workspace

    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=max_num_seqs),
        model_config=SimpleNamespace(max_model_len=max_model_len, dtype=torch.float16),
    )
    return Workspace.allocate(vllm_config, config, PAGE, Q_HEADS, KV_HEADS, HEAD_DIM, DEVICE)


def rehearsal_of(config: SparseConfig, kernel, **sizes):
    from vllm_sparse.backend.rehearsal import Rehearsal

    workspace = workspace_of(config, **sizes)
    kv = torch.zeros(1, KV_HEADS, PAGE + 1, 2 * HEAD_DIM, dtype=torch.float16)
    return Rehearsal(config, workspace, kernel, kernel, kv, GEOMETRY), workspace


@cpu_only
@pytest.mark.parametrize("name", [name for name in DECODE_POLICIES if name != "dense"])
def test_what_a_decode_step_allocates_was_rehearsed(host_code, name):
    """Host code of score, selection and the Triton kernel, at every batch size."""
    from vllm_sparse.attention.triton_attn import TritonAttention

    config = settings(decode_policy=name)
    rehearsal, workspace = rehearsal_of(config, TritonAttention())
    q = torch.empty(32, Q_HEADS, HEAD_DIM, dtype=torch.float16)
    with Allocations() as rehearsed:
        rehearsal.run(q, q)
    assert not rehearsed.waits
    largest = max(size for _, size in rehearsed.made)
    policy = DECODE_POLICIES[name]
    rows = PAGE + 8  # room for any summary
    kv = torch.zeros(1, KV_HEADS, rows, 2 * HEAD_DIM, dtype=torch.float16)
    for requests in range(1, 33):
        table = torch.zeros(requests, workspace.max_pages, dtype=torch.int32)
        plan, chosen = workspace.plan.rows(requests), workspace.table.rows(requests * KV_HEADS)
        with Allocations() as seen:
            policy.score(q[:requests], kv, table, plan, Geometry.of(q[:requests], kv, PAGE, 0.1), workspace.scores)
            host_code.select_pages(
                workspace.scores, table, plan, kv,
                config.selection(PAGE), chosen,
            )  # fmt: skip
            TritonAttention().attend(
                q[:requests], kv, chosen, Geometry.of(q[:requests], kv, PAGE, 0.1), q[:requests]
            )
        assert not seen.waits
        # Sizes between two that were rehearsed may fill a GPU a little better.
        assert max(size for _, size in seen.made) <= 1.1 * largest, f"{requests} requests: {seen.made}"


@cpu_only
def test_a_rehearsal_attends_as_many_blocks_as_a_chunk_ever_does(host_code):
    calls = []
    config = settings(prefill_policy="vertical_slash", decode_policy="dense")
    rehearsal, workspace = rehearsal_of(config, fake_fa3(lambda **given: calls.append(given)))
    buffers = workspace.prefill
    buffers.scratch = torch.empty(2, buffers.max_blocks * BLOCK_TOKENS * Q_HEADS * HEAD_DIM, dtype=torch.float16)
    for left in (buffers.lengths, buffers.starts, buffers.head_pages):
        left.fill_(2**30)  # of a step before
    q = torch.zeros(2048, Q_HEADS, HEAD_DIM, dtype=torch.float16)
    rehearsal.run(q, q)
    assert [len(call["seqused_k"]) for call in calls] == [Q_HEADS * n for n in (1, 2, 4, 8, 16)]
    assert buffers.max_blocks == 16 and len(calls[-1]["q"]) == 2048 * Q_HEADS
    assert all(not call["seqused_k"].any() and not call["cu_seqlens_q"].any() for call in calls), "it would attend"
    # The same bounds that a chunk's parts have.
    widest = [call["max_seqlen_k"] for call in calls]
    assert widest[0] >= 131072 and all(
        call["num_splits"] == fa3_attn.most_splits(len(call["q"]), HEAD_DIM, call["max_seqlen_k"])
        for call in calls
    )


def test_a_rehearsal_leaves_no_trace():
    """In plain torch, over buffers that hold a step."""
    config = settings(prefill_policy="vertical_slash", budget_tokens=512)
    rehearsal, workspace = rehearsal_of(config, TorchAttention(), max_model_len=4096, max_num_seqs=3)
    for left in (
        workspace.table.lengths,
        workspace.table.head_pages,
        workspace.prefill.lengths,
        workspace.prefill.starts,
    ):
        left.fill_(2**30)
    q = torch.zeros(200, Q_HEADS, HEAD_DIM, dtype=torch.float16, device=DEVICE)
    out = torch.zeros_like(q)
    rehearsal.kv = rehearsal.kv.to(DEVICE)
    rehearsal.run(q, out)
    counters = (workspace.plan.counters, workspace.prefill.counters, workspace.scores.arrivals)
    assert not any(counter.any() for counter in counters)
    assert single_head_pages(rehearsal.kv, PAGE)[0].count_nonzero() == 0


@pytest.mark.engine
def test_an_engine_answers_the_same_after_a_rehearsal(tiny):
    from tiny_engine import attention_layers, prompts, tokens

    sparse = {"prefill_policy": "vertical_slash", "min_prefill_tokens": 64}
    batch = prompts((300, 700, 40))
    with tiny.start(sparse=sparse, enable_prefix_caching=False) as llm:
        impls = [layer.impl for layer in attention_layers(llm).values()]
        expected = tokens(llm, batch)
        query = torch.randn(256, impls[0].num_heads, impls[0].head_size)
        impls[0].rehearse(query, torch.empty_like(query))
        assert tokens(llm, batch) == expected
        workspace = impls[0].workspace
        assert workspace.rehearsed_tokens == 256 and all(impl.workspace is workspace for impl in impls)
        kernels_before = workspace.table.head_pages
        impls[1].rehearse(query, torch.empty_like(query))
        assert workspace.table.head_pages is kernels_before


@pytest.mark.parametrize("run", ["reference", "kernel"])
def test_rows_of_a_rehearsal_are_not_read(run):
    """On a GPU whose prefill is Triton's a rehearsal read before its table, and the start failed."""
    if run == "kernel":
        pytest.importorskip("triton")
    launchers = reference if run == "reference" else importlib.import_module("vllm_sparse.kernels.launchers")
    case = make_chunk(0, 300, KV_HEADS, 3, 32)
    table = case.buffers.table(case.blocks)
    table.head_pages.fill_(2**30)
    table.lengths.zero_()
    out = torch.full_like(case.q, 7.0)
    launchers.sparse_prefill(case.q, case.kv, table, case.geometry, out)
    assert (out == 7.0).all()

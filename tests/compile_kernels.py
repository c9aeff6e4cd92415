"""Compile every Triton kernel for real GPUs on a machine without one: ``compile_kernels.py 80 90``.

Run by ``test_compile.py`` in a process of its own, since Triton's interpreter, which the other
tests use on a CPU, is chosen when Triton is imported.
"""

from __future__ import annotations

import sys

import torch
import triton
from cases import make
from offload_cases import make_store
from prefill_cases import make_chunk
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.kernels import launchers
from vllm_sparse.pages.decode_plan import segment_pages
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import SKETCH_BITS

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Shared memory that one block can have (CUDA C++ Programming Guide, compute capabilities)."""


# (kv_heads, group, head_dim, page_size); the widest dtype takes the most shared memory at head_dim 256.
SHAPES = [(8, 4, 128, 16), (2, 7, 64, 32), (1, 1, 256, 64), (4, 3, 96, 16)]
MATRIX = {torch.bfloat16: SHAPES, torch.float16: SHAPES[:1], torch.float32: SHAPES[1:3]}
NEWEST = 90
"""Compiled in all of MATRIX; older ones in its first shape and in that which takes most shared memory."""


class FakeDriver:
    """Stands in for a CUDA driver up to the point where a kernel would be loaded."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name


def compile_only(run):
    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        meta = kernel.metadata
        limit = SHARED_BYTES[meta.target.arch]
        if meta.shared > limit:
            raise SystemExit(
                f"{meta.name}: {meta.shared} bytes of shared memory, sm_{meta.target.arch} has {limit}"
            )
        print(f"  {meta.name}: {len(kernel.asm['cubin'])} bytes, {meta.shared} shared, {meta.num_warps} warps")
        return kernel

    return compiled


def compile_all(capability: int) -> None:
    driver.set_active(FakeDriver(capability))
    few = {torch.bfloat16: SHAPES[:1], torch.float32: SHAPES[2:3]}
    for dtype, shapes in (MATRIX if capability >= NEWEST else few).items():
        for kv_heads, group, head_dim, page_size in shapes:
            print(f"sm_{capability} {dtype} kv{kv_heads} group{group} d{head_dim} page{page_size}")
            case = make([300, 5], kv_heads, group, head_dim, page_size, 4, dtype=dtype, device=torch.device("cpu"))
            slots = torch.arange(3)
            key = torch.zeros(3, kv_heads, head_dim, dtype=dtype)
            for summary in ("key_range", "none"):
                launchers.page_write(key, key, case.kv, slots, page_size, summary)
            for largest in (None, 8):
                selection = case.selection(largest_pages=largest)
                launchers.plan_decode(case.seq_lens, case.plan, case.table, selection, 64, 100, True)
            pages = (case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
            launchers.range_score(*pages)
            launchers.page_mass(*pages)
            launchers.recency_score(case.block_table, case.plan, page_size, case.scores)
            launchers.random_score(case.block_table, case.plan, page_size, case.scores)
            if dtype is torch.bfloat16:  # selection sees float32 scores, whatever the cache holds
                for max_pages in (8, 8200, 70000):
                    case.plan.segment_pages = segment_pages(max_pages, 128)
                    table = case.block_table[:, :1].expand(-1, max_pages)
                    chosen = (case.scores, table, case.plan, case.kv)
                    launchers.select_pages(*chosen, Selection(page_size, 128, 1, 20), case.table)
                shares = torch.full((kv_heads,), 96, dtype=torch.int32)
                for more in ({"top_p": 0.9}, {"head_budget_pages": shares}):
                    launchers.select_pages(*chosen, Selection(page_size, 128, 1, 20, **more), case.table)
            monitor = RecallMonitor.allocate(10, 1, kv_heads * group, kv_heads, torch.device("cpu"))
            launchers.recall_mass(*pages[:4], case.table, case.geometry, monitor, 0)
            launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, case.q)
            compile_offload(make_store(8, kv_heads, head_dim, page_size, dtype=dtype), case)
            for summary in SKETCH_BITS if dtype is not torch.float16 else ():  # sketches are bytes
                case = make(
                    [300, 5], kv_heads, group, head_dim, page_size, 4, dtype=dtype, device=torch.device("cpu"),
                    summary=summary,
                )  # fmt: skip
                launchers.page_write(key, key, case.kv, slots, page_size, summary)
                launchers.sketch_score(
                    case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores, summary
                )
            compile_prefill(make_chunk(70, 200, kv_heads, group, head_dim, page_size, dtype))


def compile_offload(store, case) -> None:
    plan, hot_set, page_size, table = store.plan, store.hot_set, store.page_size, case.table
    launchers.plan_writes(torch.arange(40), page_size, plan)
    launchers.stage_pages(store.host, store.summaries, plan, 40, store.hot)
    launchers.write_through(store.hot, plan, 40, store.host, store.summaries, hot_set)
    launchers.find_hot_slots(table, store.kv_heads, page_size, plan, 1, hot_set, store.lookups)
    launchers.fetch_head_pages(store.host, table, plan, 1, hot_set, store.lookups, store.hot)
    launchers.sparse_decode(case.q, store.hot, table, case.geometry, case.q, store.host)
    pages = torch.arange(4, dtype=torch.int32)
    launchers.read_pages(store.host, pages, torch.empty_like(store.host), pages, 32)


def compile_prefill(case) -> None:
    blocks, page_size, buffers = case.blocks, case.page_size, case.buffers
    keep, table, mass = buffers.keep_mask(blocks), buffers.table(blocks), buffers.probe_masses(blocks)
    launchers.probe_mass(
        case.q, case.kv, case.block_table, blocks, case.geometry, buffers.probe_lse,
        torch.empty(1 << 20, dtype=case.kv.dtype), mass,
    )  # fmt: skip
    patterns = HeadPatterns.of([HeadPattern(top_p=0.9)] * case.q_heads, page_size, case.q.device)
    launchers.select_bands(
        mass, blocks, page_size, patterns, 1, buffers.masses, buffers.page_keep, buffers.band_count
    )  # fmt: skip
    launchers.vertical_slash(buffers.page_keep, buffers.band_count, blocks, page_size, keep)
    pattern = PositionPattern(16, 32, 2, 2, 64, 32)
    launchers.position_pattern(pattern, blocks, page_size, keep)
    scores = buffers.scores(blocks)
    scored = (case.q, case.kv, case.block_table, blocks, case.geometry)
    launchers.pooled_score(*scored, buffers.pooled, scores)
    launchers.pooled_score(*scored, buffers.pooled, scores, buffers.query_aware)
    launchers.antidiagonal_score(*scored, scores)
    # So many blocks that a program holds as many as it can.
    many = make_chunk(0, 2048, case.kv.shape[1], case.group, case.q.shape[2], page_size, case.kv.dtype)
    launchers.antidiagonal_score(
        many.q, many.kv, many.block_table, many.blocks, many.geometry, many.buffers.scores(many.blocks)
    )
    pooled = buffers.masses[0, :, : case.num_pages]
    launchers.pattern_distance(mass, pooled, blocks, page_size, 0.1, buffers.query_aware)
    for heads in (None, buffers.query_aware):
        launchers.select_row_pages(scores, blocks, page_size, 2, 0.0, keep, heads)
    launchers.prefill_table(
        keep, case.block_table, blocks, case.kv, Selection(page_size, 1, 1, 20), buffers.counters, table
    )
    launchers.sparse_prefill(case.q, case.kv, table, case.geometry, case.q)


if __name__ == "__main__":
    print("triton", triton.__version__)
    JITFunction.run = compile_only(JITFunction.run)
    for argument in sys.argv[1:]:
        compile_all(int(argument))

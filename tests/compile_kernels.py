"""Compile every Triton kernel for real GPUs on a machine without one: ``compile_kernels.py 80 89``.

Run by ``test_compile.py`` in a process of its own, since Triton's interpreter, which the other tests use on a CPU,
is chosen when Triton is imported.

Three layers cover what code depends on: each dtype, and groups, head sizes and page sizes of each kind (a power
of two, one that is padded, the least, the widest). Variants of a kernel (summaries, sizes of a segment, offload,
fp8, heads that ask) take turns over the layers, so each is compiled at least once, not with everything else. The
layer in float32, whose products are the same instructions on all GPUs, is left to the newest. The widest layer
shows that tiles fit the shared memory of each GPU, of which those of capability 8.9 have least: they are cut by
bytes, and products of 16-bit numbers stage more of them than those of float32.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import triton
from cases import make
from offload_cases import make_store
from prefill_cases import make_chunk
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.kernels import e4m3, launchers
from vllm_sparse.pages.decode_plan import segment_pages
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.position_pattern import PositionPattern
from vllm_sparse.pages.selection import Selection

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Shared memory that one block can have (CUDA C++ Programming Guide, compute capabilities)."""


@dataclass(frozen=True)
class Layer:
    """A layer that kernels are compiled for, and which of their variants are."""

    dtype: torch.dtype
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    summaries: tuple[str, ...]
    """What ``page_write`` writes; the last one is a sketch, which ``sketch_score`` reads."""
    selections: tuple[tuple[int, dict], ...]
    """Most pages of a context, which choose the size of a segment, and more of its Selection."""
    fp8: bool
    """The host pool holds e4m3."""
    heads_ask: tuple[bool, ...]
    """Prefill kernels that only work for some heads: whether they are told which."""
    blocks: tuple[int, ...]
    """Query blocks of a chunk: ``antidiagonal_score`` holds up to 16 in a program."""
    query_tokens: int
    """Most query tokens of a request in steps that verify drafts; 1: there are no such steps."""


USUAL = Layer(
    torch.bfloat16, 8, 4, 128, 16, ("key_range", "sketch1"), ((8200, {}), (70000, {})), True, (False, True),
    (2, 16), 4,
)  # fmt: skip
PADDED = Layer(
    torch.float32, 2, 7, 96, 32, ("key_range", "sketch2"), ((8, {"top_p": 0.9}),), False, (True,), (2,), 1
)  # fmt: skip
WIDEST = Layer(
    torch.float16, 1, 8, 512, 64, ("none", "sketch2"),
    ((8, {"head_budget_pages": 96}), (8, {"top_p": 0.9})), False, (False,), (16,), 2,
)  # fmt: skip
NARROW = replace(WIDEST, head_dim=64, query_tokens=17)
LAYERS = {80: (NARROW,), 89: (WIDEST,), 90: (USUAL, PADDED, WIDEST)}
"""By compute capability. The widest layer's tiles are the same on all, and 8.9 has least memory for them; what
else differs between 8.0 and 8.9 is e4m3, over which each compiles the usual layer."""


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


VARIANTS: dict[str, set[str]] = defaultdict(set)
"""Of each kernel, hashes of what was compiled."""


def compile_only(run):
    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        meta = kernel.metadata
        VARIANTS[meta.name].add(kernel.hash)
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
    for layer in LAYERS[capability]:
        print(f"sm_{capability} {layer}")
        shape = (layer.kv_heads, layer.group, layer.head_dim, layer.page_size)
        for summary in layer.summaries:
            case = make(
                [300, 5], *shape, 4, dtype=layer.dtype, device=torch.device("cpu"), summary=summary
            )  # fmt: skip
            key = torch.zeros(3, layer.kv_heads, layer.head_dim, dtype=layer.dtype)
            launchers.page_write(key, key, case.kv, torch.arange(3), layer.page_size, summary)
        pages = (case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
        launchers.sketch_score(*pages, summary)
        compile_decode(layer, make([300, 5], *shape, 4, dtype=layer.dtype, device=torch.device("cpu")))
        if layer.query_tokens > 1:
            compile_drafts(layer)
        compile_prefill(layer, make_chunk(70, 200, *shape, layer.dtype))


def compile_codes(capability: int) -> None:
    """What reads or writes elements of a cache, over e4m3, as each GPU converts it."""
    e4m3.converts_e4m3 = lambda device: capability >= 89
    print(f"sm_{capability} e4m3")
    cpu, coded = torch.device("cpu"), {"kv_dtype": torch.float8_e4m3fn, "kv_scales": (0.5, 0.3)}
    dtype, shape = torch.bfloat16, (8, 4, 128, 16)
    case = make([300, 5], *shape, 4, dtype=dtype, device=cpu, **coded)
    pages = (case.q, case.kv, case.block_table, case.plan, case.geometry)
    key = torch.zeros(3, case.kv_heads, shape[2], dtype=dtype)
    for summary in ("key_range", "sketch1"):
        kv = make([300, 5], *shape, 4, dtype=dtype, device=cpu, summary=summary, **coded).kv
        launchers.page_write(key, key, kv, torch.arange(3), shape[3], summary, 0.5, 0.3)
    launchers.code_queries(case.q, 0.5, torch.zeros_like(case.q).to(torch.float8_e4m3fn))
    launchers.page_mass(*pages, case.scores)
    monitor = RecallMonitor.allocate(10, 1, case.q.shape[1], case.kv_heads, cpu)
    launchers.recall_mass(*pages[:4], case.table, case.geometry, monitor, 0)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, case.q)
    whole = replace(case.table, routes=case.plan.score_offsets, block_table=case.block_table)
    launchers.sparse_decode(case.q, case.kv, whole, case.geometry, case.q, case.kv)
    chunk = make_chunk(70, 200, *shape, dtype, **coded)
    buffers, pages = chunk.buffers, (chunk.q, chunk.kv, chunk.block_table, chunk.blocks, chunk.geometry)
    room, mass = torch.empty(1 << 20, dtype=dtype), buffers.probe_masses(chunk.blocks)
    launchers.probe_mass(*pages, buffers.probe_lse, room, mass)
    launchers.pooled_score(*pages, buffers.pooled, buffers.scores(chunk.blocks))
    launchers.antidiagonal_score(*pages, buffers.scores(chunk.blocks))
    launchers.sample_mass(*pages, room, buffers.scores(chunk.blocks))
    launchers.sparse_prefill(chunk.q, chunk.kv, buffers.table(chunk.blocks), chunk.geometry, chunk.q)


def compile_decode(layer: Layer, case) -> None:
    cpu, page_size = torch.device("cpu"), layer.page_size
    largest = 96 if any("head_budget_pages" in more for _, more in layer.selections) else None
    selection = case.selection(largest_pages=largest)
    launchers.plan_decode(case.seq_lens, case.plan, case.table, selection, 64, 100, True)
    pages = (case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    launchers.range_score(*pages)
    launchers.page_mass(*pages)
    launchers.recency_score(case.block_table, case.plan, page_size, case.scores)
    launchers.random_score(case.block_table, case.plan, page_size, case.scores)
    for max_pages, more in layer.selections:
        if "head_budget_pages" in more:
            more = {"head_budget_pages": torch.full((layer.kv_heads,), 96, dtype=torch.int32)}
        case.plan.segment_pages = segment_pages(max_pages, 128)
        table = case.block_table[:, :1].expand(-1, max_pages)
        launchers.select_pages(
            case.scores, table, case.plan, case.kv, Selection(page_size, 128, 1, 20, **more), case.table
        )
    monitor = RecallMonitor.allocate(10, 1, layer.kv_heads * layer.group, layer.kv_heads, cpu)
    launchers.recall_mass(*pages[:4], case.table, case.geometry, monitor, 0)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, case.q)
    store = make_store(8, layer.kv_heads, layer.head_dim, page_size, dtype=layer.dtype, fp8=layer.fp8)
    plan, hot_set, exponents = store.plan, store.hot_set, store.exponents
    launchers.plan_writes(torch.arange(40), page_size, plan)
    launchers.stage_pages(store.host, store.summaries, plan, 40, store.hot, exponents)
    launchers.write_through(store.hot, plan, 40, store.host, store.summaries, hot_set, exponents)
    launchers.find_hot_slots(case.table, layer.kv_heads, page_size, plan, 1, hot_set, store.lookups)
    launchers.fetch_head_pages(store.host, case.table, plan, 1, hot_set, store.lookups, store.hot, exponents)
    # Beside a dense backend the table does not list rows of prompt tokens.
    whole = replace(case.table, routes=case.plan.score_offsets, block_table=case.block_table)
    launchers.sparse_decode(case.q, store.hot, whole, case.geometry, case.q, store.host, exponents)
    blocks = torch.arange(4, dtype=torch.int32)
    out = torch.empty(store.host.shape, dtype=layer.dtype)
    launchers.read_pages(store.host, blocks, out, blocks, 32, exponents)


def compile_drafts(layer: Layer) -> None:
    """What reads queries by request, for steps in which requests have several."""
    most, cpu = layer.query_tokens, torch.device("cpu")
    shape = (layer.kv_heads, layer.group, layer.head_dim, layer.page_size)
    drafts = {"dtype": layer.dtype, "device": cpu, "query_tokens": [most, 1], "most_tokens": most}
    sketch = make([300, 50], *shape, 4, summary=layer.summaries[-1], **drafts)
    case = make([300, 50], *shape, 4, **drafts)
    for one, score in (
        (sketch, launchers.sketch_score),
        (case, launchers.range_score),
        (case, launchers.page_mass),
    ):
        more = (layer.summaries[-1],) if score is launchers.sketch_score else ()
        score(one.q, one.kv, one.block_table, one.plan, one.geometry, one.scores, *more)
    case.table.routes, case.table.block_table = case.plan.score_offsets, case.block_table
    launchers.plan_decode(case.seq_lens, case.plan, case.table, case.selection(), 64, 100, True)
    launchers.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    monitor = RecallMonitor.allocate(10, 1, layer.kv_heads * layer.group, layer.kv_heads, cpu)
    for geometry in (case.geometry, with_caps_and_sinks(case.geometry)):
        launchers.recall_mass(case.q, case.kv, case.block_table, case.plan, case.table, geometry, monitor, 0)
        launchers.sparse_decode(case.q, case.kv, case.table, geometry, case.q)
    launchers.page_mass(case.q, case.kv, case.block_table, case.plan, geometry, case.scores)
    store = make_store(8, layer.kv_heads, layer.head_dim, layer.page_size, dtype=layer.dtype, fp8=layer.fp8)
    launchers.find_hot_slots(
        case.table, layer.kv_heads, layer.page_size, store.plan, 1, store.hot_set, store.lookups
    )  # fmt: skip


def compile_prefill(layer: Layer, case) -> None:
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
    for asked in layer.heads_ask:
        heads = buffers.query_aware if asked else None
        launchers.pooled_score(
            case.q, case.kv, case.block_table, blocks, case.geometry, buffers.pooled, scores, heads
        )
        launchers.select_row_pages(scores, blocks, page_size, 2, 0.0, keep, heads)
    launchers.select_row_pages(scores, blocks, page_size, 2, 0.9, keep, own_pages=True)
    for num_blocks in layer.blocks:
        chunk = make_chunk(
            0, 128 * num_blocks, layer.kv_heads, layer.group, layer.head_dim, page_size, layer.dtype
        )  # fmt: skip
        launchers.antidiagonal_score(
            chunk.q, chunk.kv, chunk.block_table, chunk.blocks, chunk.geometry, chunk.buffers.scores(chunk.blocks)
        )
    pooled = buffers.masses[0, :, : case.num_pages]
    launchers.pattern_distance(mass, pooled, blocks, page_size, 0.1, buffers.query_aware)
    launchers.prefill_table(
        keep, case.block_table, blocks, case.kv, Selection(page_size, 1, 1, 20), buffers.counters, table
    )
    room = torch.empty(1 << 20, dtype=case.kv.dtype)
    # In float32, which takes longest, what caps and sinks add is that of 16 bits.
    changed = [] if layer.dtype == torch.float32 else [with_caps_and_sinks(case.geometry)]
    for geometry in (case.geometry, *changed):
        launchers.sample_mass(case.q, case.kv, case.block_table, blocks, geometry, room, scores)
        launchers.sparse_prefill(case.q, case.kv, table, geometry, case.q)


def check_chunks_share_kernels() -> None:
    """What a long context launches was compiled for a short one: no request waits for a compiler."""
    seen = []
    for context, tokens in ((0, 128), (70, 1300), (20000, 300)):
        VARIANTS.clear()
        case = make_chunk(context, tokens, 2, 4, 64, 16, torch.bfloat16)
        scores, room = case.buffers.scores(case.blocks), torch.empty(1 << 22, dtype=torch.bfloat16)
        launchers.sample_mass(case.q, case.kv, case.block_table, case.blocks, case.geometry, room, scores)
        launchers.select_row_pages(
            scores, case.blocks, 16, 0, 0.9, case.buffers.keep_mask(case.blocks), own_pages=True
        )
        seen.append(dict(VARIANTS))
    if seen != seen[:1] * len(seen):
        raise SystemExit(f"contexts of other lengths compile other kernels: {seen}")


def with_caps_and_sinks(geometry: Geometry) -> Geometry:
    return replace(geometry, soft_cap=30.0, sink_logits=torch.zeros(geometry.q_heads, dtype=torch.bfloat16))


if __name__ == "__main__":
    print("triton", triton.__version__)
    JITFunction.run = compile_only(JITFunction.run)
    for argument in sys.argv[1:]:
        compile_all(int(argument))
        compile_codes(int(argument))
        if int(argument) == max(LAYERS):
            check_chunks_share_kernels()

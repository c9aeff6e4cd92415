"""Time a decode step of one layer on this GPU, sparse beside what stock vLLM would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_sparse import kernels
from vllm_sparse.attention import DECODE_ORDER, choose_kernel
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.decode_plan import DecodePlan, segment_pages
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.summaries import summary_slots
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.tools.pays import Pays, Point, crossing

WORKING_SET_BYTES = 256 << 20
"""Layers take turns until what they read exceeds the L2 cache several times, as those of a model do."""
MOST_LAYERS = 16
MOST_BYTES = 4 << 30
"""Of the caches of these layers, beside whatever else runs on the GPU."""


@dataclass
class LayerStep:
    """A request of some context in one layer, with a cache of its own."""

    run_sparse: Callable[[], object]
    run_stock: Callable[[], object]


def measure(
    shape: AttentionShape, config: SparseConfig, contexts: list[int], about: str,
    time: Callable[[list[Callable]], float],
) -> Pays:  # fmt: skip
    """Times of single requests of ``contexts`` tokens, rising.

    Args:
        shape: of the layer, on the device to measure.
        config: its policy, budget, sinks and window.
        about: the device and versions, in words.
        time: microseconds of one of several runs.

    Raises:
        ConfigError: no context fits the memory that may be taken, or there is no dense kernel to compare with.
    """
    shape = replace(shape, geometry=replace(shape.geometry, sink_logits=None))  # which come with the weights
    points = []
    for tokens in contexts:
        if tokens * 2 * shape.geometry.kv_heads * shape.geometry.head_dim * shape.kv_dtype.itemsize > MOST_BYTES:
            break
        steps = [layer_step(shape, config, tokens) for _ in range(_layers(shape, config, tokens))]
        points.append(
            Point(tokens, time([step.run_stock for step in steps]), time([step.run_sparse for step in steps]))
        )
    if not points:
        raise ConfigError(
            f"--measure: no context of {contexts} takes less than {MOST_BYTES >> 30} GiB in one layer"
        )
    return Pays(tuple(points), about, True, crossing(points))


def _layers(shape: AttentionShape, config: SparseConfig, tokens: int) -> int:
    geometry = shape.geometry
    layer_bytes = 2 * tokens * geometry.kv_heads * geometry.head_dim * shape.kv_dtype.itemsize
    read = max(1, layer_bytes // 32)  # at least: summaries
    return max(1, min(MOST_LAYERS, -(-WORKING_SET_BYTES // read), MOST_BYTES // (2 * layer_bytes)))


def layer_step(shape: AttentionShape, config: SparseConfig, tokens: int) -> LayerStep:
    """The kernels of a request of ``tokens`` tokens in a layer with random K, V and queries."""
    geometry, device = shape.geometry, shape.device
    launchers, policy = kernels.for_device(device), DECODE_POLICIES[config.decode_policy]
    page, heads, dim = geometry.page_size, geometry.kv_heads, geometry.head_dim
    pages = -(-tokens // page)
    slots = page + summary_slots(policy.summary, page, dim, shape.kv_dtype.itemsize)
    cache = torch.zeros(pages, heads, slots, 2 * dim, dtype=shape.kv_dtype, device=device)
    key, value = torch.randn(2, pages * page, heads, dim, dtype=shape.dtype, device=device)
    launchers.page_write(key, value, cache, torch.arange(pages * page, device=device), page, policy.summary)
    # Most steps do not complete a page.
    new, slot = key[-1:].clone(), torch.tensor([(tokens - 1) // page * page], device=device)
    query = torch.randn(1, geometry.q_heads, dim, dtype=shape.dtype, device=device)
    out = torch.empty_like(query)
    block_table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    seq_lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    selection, budget = config.selection(page), config.budget_pages(page)
    plan = DecodePlan.empty(1, device, segment_pages(pages, budget if budget < pages else 1)).rows(1)
    table = PageTable.empty(1, heads, config.table_pages(page), device)
    launchers.plan_decode(seq_lens, plan, table, selection, config.min_context_tokens, pages, False)
    scores = PageScores.empty(geometry.q_heads, pages, 1, device)
    attention = choose_kernel(config.attention_kernel, shape, DECODE_ORDER)

    def run_sparse():
        launchers.page_write(new, new, cache, slot, page, policy.summary)
        policy.score(query, cache, block_table, plan, geometry, scores)
        launchers.select_pages(scores, block_table, plan, cache, selection, table)
        attention.attend_rows(query, cache, table, geometry, out)

    return LayerStep(run_sparse, stock_step(shape, cache, new, query, out, block_table, seq_lens, slot))


def stock_step(shape, cache, new, query, out, block_table, seq_lens, slot) -> Callable[[], object]:
    """What FLASH_ATTN of vLLM runs: it writes a token, and attends to every page of ``cache``.

    Raises:
        ConfigError: it does not run here.
    """
    try:
        from vllm._custom_ops import reshape_and_cache_flash
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        version = get_flash_attn_version(head_size=shape.geometry.head_dim)
    except (ImportError, AssertionError) as error:
        raise ConfigError(f"--measure: vLLM has no FlashAttention here to compare with ({error})") from error
    coded = shape.kv_dtype is torch.float8_e4m3fn
    if version is None or (coded and version != 3):
        raise ConfigError(
            f"--measure: FlashAttention {version} of vLLM has no kernel here for a KV cache of {shape.kv_dtype}, "
            f"and there is no other to compare with; allowed: --kv-cache-dtype auto"
        )
    page, one = shape.geometry.page_size, torch.ones((), device=shape.device)
    k, v = cache[:, :, :page].transpose(1, 2).split(shape.geometry.head_dim, -1)
    written = [part.view(torch.uint8) if coded else part for part in (k, v)]
    starts = torch.tensor([0, 1], dtype=torch.int32, device=shape.device)
    dense_query, longest = query.to(shape.kv_dtype), int(seq_lens)

    def run():
        reshape_and_cache_flash(new, new, *written, slot, "fp8" if coded else "auto", one, one)
        flash_attn_varlen_func(
            q=dense_query, k=k, v=v, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=seq_lens,
            max_seqlen_k=longest, block_table=block_table, softmax_scale=shape.geometry.scale, causal=True,
            fa_version=version,
        )  # fmt: skip

    return run


def graph_us(runs: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median microseconds of one run, from replays of a CUDA graph that holds each of ``runs`` once.

    Several runs over different data keep the L2 cache from holding what a real step would read from memory; the
    graph leaves launch gaps out.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for _ in range(3):
        graph.replay()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
    return times[repeats // 2] * 1e3 / len(runs)

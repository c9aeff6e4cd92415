"""Random paged caches and batches that kernel, policy and engine tests share."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.store_scores import store_scores
from vllm_sparse.pages.decode_plan import SEGMENT_PAGES, DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_tokens import ONE, QueryTokens
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import summary_slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# Triton's interpreter computes bf16 products wrongly; a GPU covers it.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """One decode batch over a filled cache; tensors as described in page_table and decode_plan."""

    q: torch.Tensor
    kv: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    plan: DecodePlan
    scores: PageScores
    table: PageTable
    page_size: int
    budget_pages: int
    scale: float
    kv_scales: tuple[float, float] = (1.0, 1.0)

    @property
    def kv_heads(self) -> int:
        return self.kv.shape[1]

    def selection(self, sink_pages: int = 1, window_tokens: int = 20, **more) -> Selection:
        return Selection(self.page_size, self.budget_pages, sink_pages, window_tokens, **more)

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.q, self.kv, self.page_size, self.scale).quantised(*self.kv_scales, 1.0)


def make(
    seq_lens: list[int],
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    page_size: int = 16,
    budget_pages: int = 6,
    min_context_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
    device: torch.device = DEVICE,
    seed: int | None = None,
    segment_pages: int = SEGMENT_PAGES,
    summary: str = "key_range",
    padding: int = 48,
    kv_dtype: torch.dtype | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    query_tokens: list[int] | None = None,
    most_tokens: int = 1,
) -> Case:
    """A batch with fresh random contents; unused pages, rows past the end and outputs are poison.

    ``query_tokens`` says how many query tokens each request has, at most ``most_tokens``; one each without it.

    ``layers`` > 1 lays the cache out with other layers' pages between its blocks, ``padding`` with as many
    numbers, as vLLM does where another layer's block is larger: a block is then no whole number of pages long.
    """
    kv_dtype = kv_dtype or dtype
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    pages = [-(-n // page_size) for n in seq_lens]
    num_blocks = sum(pages) + 3
    rows = page_size + summary_slots(summary, page_size, head_dim, kv_dtype.itemsize)
    page = (layers, kv_heads, rows, 2 * head_dim)
    storage = torch.full((num_blocks, prod(page) + padding), float("nan"), dtype=kv_dtype, device=device)
    kv = storage[:, : prod(page)].unflatten(1, page)[:, layers - 1]
    block_table = torch.full((len(seq_lens), max(pages) + 2), num_blocks - 1, dtype=torch.int32)
    order = torch.randperm(num_blocks - 2, generator=generator) + 1
    key_bias = torch.randn(kv_heads, head_dim, generator=generator)
    used = 0
    for request, (length, count) in enumerate(zip(seq_lens, pages, strict=True)):
        if not length:
            continue
        blocks = order[used : used + count]
        used += count
        block_table[request, :count] = blocks.int()
        slots = (blocks[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        tokens = torch.randn(2, length, kv_heads, head_dim, generator=generator)
        key, value = (tokens[0] + key_bias).to(dtype), tokens[1].to(dtype)
        new = key.to(device), value.to(device)
        reference.page_write(*new, kv, slots.to(device), page_size, summary, *kv_scales)
    counts = torch.tensor([1] * len(seq_lens) if query_tokens is None else query_tokens)
    q = torch.randn(int(counts.sum()), kv_heads * group, head_dim, generator=generator).to(dtype)
    queries = ONE
    if query_tokens is not None:
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        queries = QueryTokens(most_tokens, starts.to(device))
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    plan = DecodePlan.empty(len(seq_lens), device, segment_pages).rows(len(seq_lens), queries)
    capacity = sum(pages) + 1
    width = max(budget_pages, -(-min_context_tokens // page_size), 1)
    table = PageTable.empty(len(seq_lens), kv_heads, width, device)
    table.head_pages.fill_(2**30)
    table.lengths.fill_(-1)
    table.queries = queries
    selection = Selection(page_size, budget_pages, 1, 20)
    reference.plan_decode(lens, plan, table, selection, min_context_tokens, capacity, False)
    return Case(
        q=q.to(device), kv=kv, block_table=block_table.to(device), seq_lens=lens, plan=plan,
        scores=poisoned_scores(kv_heads * group, capacity, len(seq_lens), device),
        table=table, page_size=page_size, budget_pages=budget_pages, scale=head_dim**-0.5, kv_scales=kv_scales,
    )  # fmt: skip


def poisoned_scores(q_heads: int, capacity: int, num_reqs: int, device: torch.device) -> PageScores:
    scores = PageScores.empty(q_heads, capacity, num_reqs, device)
    scores.values.fill_(float("nan"))
    scores.chunk_lse.fill_(float("nan"))
    return scores


def set_scores(case: Case, values: torch.Tensor) -> None:
    """Give every scored page its column of ``values`` [q_heads, capacity_pages]."""
    for request, offset in enumerate(case.plan.score_offsets.tolist()):
        if offset >= 0:
            pages = -(-int(case.seq_lens[request]) // case.page_size)
            store_scores(case.scores, request, offset, values[:, offset : offset + pages])


def random_scores(case: Case) -> None:
    set_scores(case, torch.randn_like(case.scores.values))


def select_reference(case: Case, sink_pages: int = 1, window_tokens: int = 20) -> None:
    """Fill ``case.table`` through the torch reference, from ``case.scores``."""
    selection = case.selection(sink_pages, window_tokens)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, selection, case.table)


def in_float64(kv: torch.Tensor) -> torch.Tensor:
    """A copy of a cache laid out as it is, so that page tables of the one are page tables of the other."""
    return torch.empty_strided(kv.shape, kv.stride(), dtype=torch.float64, device=kv.device).copy_(kv)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the whole tensor; NaN anywhere gives NaN, which passes no comparison."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()

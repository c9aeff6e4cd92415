"""Soft caps and sink logits: what some models do to logits, in every kernel that attends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEVICE, DTYPES, TOLERANCE, Case, error, in_float64, make
from prefill_cases import SIXTEEN_BITS, keys_and_values, make_chunk
from test_kernels import shape_id

from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.recall_sums import RecallSums

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers

SHAPES = [(2, 3, 64, 16), (1, 4, 96, 32)]
LENGTHS = [17, 0, 130, 33, 205]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
kinds = pytest.mark.parametrize("kind", ["soft_cap", "sinks", "both"])


def changed(geometry: Geometry, kind: str) -> Geometry:
    """``geometry`` with logits that are capped low, and sinks that take much of the softmax."""
    sinks = 15 + torch.randn(geometry.q_heads, device=DEVICE).to(torch.bfloat16)
    changes = {"soft_cap": 1.5} if kind != "sinks" else {}
    return replace(geometry, **changes, **({"sink_logits": sinks} if kind != "soft_cap" else {}))


def expected_of(geometry: Geometry, query, keys, values, sinks) -> torch.Tensor:
    """Attention by its definition, in float64: query [..., head_dim] over keys and values [tokens, head_dim]."""
    logits = query.double() @ keys.double().T * geometry.scale
    if geometry.soft_cap:
        logits = geometry.soft_cap * torch.tanh(logits / geometry.soft_cap)
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[..., None]
    return weights / total @ values.double()


def context(case: Case, request: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages = case.block_table[request, : -(-LENGTHS[request] // case.page_size)].long()
    return case.kv[pages, head, : case.page_size].flatten(0, 1)[: LENGTHS[request]].chunk(2, -1)


@shapes
@kinds
@pytest.mark.parametrize(
    ("dtype", "splits"), [(torch.float32, 1), (DTYPES[-1], 64)], ids=["float32_alone", "half_split"]
)
def test_decode(shape, kind, dtype, splits, monkeypatch):
    monkeypatch.setitem(launchers.sparse_decode.__globals__, "MAX_SPLITS", splits)
    monkeypatch.setitem(launchers.sparse_decode.__globals__["TUNING"], "block_tokens", 16)
    case = make(LENGTHS, *shape, 64, dtype=dtype)
    geometry = changed(case.geometry, kind)
    reference.page_mass(case.q, case.kv, case.block_table, case.plan, geometry, case.scores)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    found, by_reference = torch.full_like(case.q, 7.0), torch.full_like(case.q, 7.0, dtype=torch.float64)
    launchers.sparse_decode(case.q, case.kv, case.table, geometry, found)
    reference.sparse_decode(case.q.double(), in_float64(case.kv), case.table, geometry, by_reference)
    assert error(found, by_reference) < TOLERANCE[dtype]
    group = shape[1]
    for request in (0, 2, 4):
        for head in range(shape[0]):
            heads = slice(head * group, (head + 1) * group)
            sinks = None if geometry.sink_logits is None else geometry.sink_logits[heads]
            exact = expected_of(geometry, case.q[request, heads], *context(case, request, head), sinks)
            assert error(by_reference[request, heads], exact) < 1e-5
    plain = torch.empty_like(case.q)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, plain)
    assert error(plain[[0, 2, 3, 4]], by_reference[[0, 2, 3, 4]]) > 0.01, "a kernel that ignores them would pass"


@shapes
@kinds
def test_prefill(shape, kind):
    chunk = make_chunk(70, 200, *shape, torch.float32)
    geometry = changed(chunk.geometry, kind)
    keep, table = chunk.buffers.keep_mask(chunk.blocks), chunk.buffers.table(chunk.blocks)
    keep.fill_(1)
    selection = replace(make([5], *shape, 4).selection(), page_size=shape[-1])
    reference.prefill_table(
        keep, chunk.block_table, chunk.blocks, chunk.kv, selection, chunk.buffers.counters, table
    )
    found, expected = torch.full_like(chunk.q, 7.0), torch.full_like(chunk.q, 7.0)
    launchers.sparse_prefill(chunk.q, chunk.kv, table, geometry, found)
    reference.sparse_prefill(chunk.q, chunk.kv, table, geometry, expected)
    assert error(found, expected) < 2e-5
    dense = torch.empty_like(chunk.q)
    starts = torch.tensor([0, len(chunk.q)], device=DEVICE)
    lens = torch.tensor([chunk.blocks.end_position], device=DEVICE)
    reference.dense_attention(chunk.q, chunk.kv, chunk.block_table[None], starts, lens, geometry, dense)
    assert error(found, dense) < 2e-5


@shapes
@kinds
def test_masses_and_recall(shape, kind):
    case = make(LENGTHS, *shape, 4)
    geometry = changed(case.geometry, kind)
    args = (case.q, case.kv, case.block_table, case.plan, geometry)
    launchers.page_mass(*args, case.scores)
    found = case.scores.values.clone()
    reference.page_mass(*args, case.scores)
    written = ~case.scores.values.isnan()
    assert torch.allclose(found[written], case.scores.values[written], atol=1e-4)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    sums = [RecallSums.allocate(1, 1, shape[0] * shape[1], shape[0], DEVICE) for _ in range(2)]
    for kernels, monitor in zip((launchers, reference), sums, strict=True):
        for _ in range(3):
            monitor.step.add_(1)
            kernels.recall_mass(*args[:4], case.table, geometry, monitor, 0)
    assert torch.allclose(*(monitor.sums for monitor in sums), rtol=1e-4)
    if kind == "sinks":
        plain = RecallSums.allocate(1, 1, shape[0] * shape[1], shape[0], DEVICE)
        for _ in range(3):
            plain.step.add_(1)
            launchers.recall_mass(*args[:4], case.table, case.geometry, plain, 0)
        assert (sums[0].sums[..., 0] > plain.sums[..., 0]).all(), "a sink is held whatever is chosen"


@kinds
@pytest.mark.parametrize("run", [reference, launchers], ids=["reference", "kernel"])
def test_samples_of_prefill(run, kind):
    """Shares of an asked query's attention, of its sink what is left, by the largest logit of each 16 keys."""
    case = make_chunk(60, 8, 2, 3, 64, 16)
    geometry = changed(case.geometry, kind)
    scores = torch.full((case.q_heads, case.num_pages), float("nan"), device=DEVICE)
    run.sample_mass(case.q, case.kv, case.block_table, case.blocks, geometry, case.buffers.scratch, scores)
    keys, _ = keys_and_values(case)
    logits = (keys @ case.q.double()[7, :, :, None])[..., 0] * geometry.scale
    if geometry.soft_cap:
        logits = geometry.soft_cap * torch.tanh(logits / geometry.soft_cap)
    logits = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 16), value=float("-inf"))
    weights = logits.unflatten(1, (-1, 16)).amax(2).exp()
    total = weights.sum(1, keepdim=True)
    if geometry.sink_logits is not None:
        total = total + geometry.sink_logits.double().exp()[:, None]
    assert error(scores.exp(), weights / total) < SIXTEEN_BITS

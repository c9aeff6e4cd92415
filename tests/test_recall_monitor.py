"""The recall monitor: kernel against reference, reference against plain attention, both in an engine."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, TOLERANCE, make, random_scores, select_reference
from tiny_engine import engine_core, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode import recall_monitor
from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.reports import REPORT_STEPS

LENGTHS = [0, 200, 15, 389, 1, 33, 1500]
SCORED = [1, 3, 6]
"""Requests with more pages than the budget."""
# (kv_heads, group, head_dim, page_size)
SHAPES = [(2, 3, 64, 16), (1, 1, 128, 16), (3, 4, 96, 32), (1, 7, 256, 16)]


def chosen_case(shape=SHAPES[0], dtype=torch.float32, **kwargs):
    kv_heads, group, head_dim, page_size = shape
    case = make(LENGTHS, kv_heads, group, head_dim, page_size, 4, dtype=dtype, **kwargs)
    random_scores(case)
    select_reference(case)
    return case


def monitor_of(case, every: int = 1, layers: int = 3) -> RecallMonitor:
    monitor = RecallMonitor.allocate(every, layers, case.q.shape[1], case.kv_heads, DEVICE)
    monitor.parts.fill_(float("nan"))
    return monitor


def run(kernels, case, monitor: RecallMonitor, step: int, layer: int = 1) -> None:
    monitor.step.fill_(step)
    kernels.recall_mass(case.q, case.kv, case.block_table, case.plan, case.table, case.geometry, monitor, layer)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_adds_the_share_of_plain_attention_on_chosen_pages(shape):
    case = chosen_case(shape)
    for index, request in enumerate(SCORED):
        monitor, length = monitor_of(case), LENGTHS[request]
        run(reference, case, monitor, step=3 + index)
        blocks = case.block_table[request, : -(-length // case.page_size)]
        head_dim = case.q.shape[-1]
        for head, query in enumerate(case.q[request].unflatten(0, (case.kv_heads, -1))):
            keys = case.kv[blocks, head, : case.page_size, :head_dim].flatten(0, 1)[:length]
            weights = (query @ keys.T * case.scale).softmax(-1)
            head_pages = case.table.head_pages[request * case.kv_heads + head, : case.budget_pages]
            kept = torch.isin(blocks, HeadPageGrid.of(case.kv).split(head_pages)[0]).repeat_interleave(
                case.page_size
            )[:length]
            share, rows = monitor.sums[1, head].tolist()
            assert share == pytest.approx(weights[:, kept].sum(-1).mean().item(), rel=1e-4) and 0 < share < 1
            assert rows == 1
        assert not monitor.sums[[0, 2]].any(), "another layer's"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_kernel_matches_the_reference_step_by_step(shape, dtype):
    pytest.importorskip("triton")
    from vllm_sparse.kernels import launchers

    case = chosen_case(shape, dtype, layers=2)
    actual, expected = monitor_of(case, every=2), monitor_of(case, every=2)
    seen = []
    for step in range(1, 5):
        before = expected.sums.clone()
        run(launchers, case, actual, step)
        run(reference, case, expected, step)
        assert torch.allclose(actual.sums, expected.sums, rtol=10 * TOLERANCE[dtype], atol=0)
        seen.append(not torch.equal(before, expected.sums))
        assert not actual.arrivals.any()
    assert seen == [False, True] * 2, "every second step"
    assert expected.sums[1, :, 1].tolist() == [2.0] * case.kv_heads


def test_a_step_without_chosen_pages_and_a_full_budget_say_so():
    case = make([40, 3], budget_pages=8)
    select_reference(case)
    monitor = monitor_of(case)
    run(reference, case, monitor, step=1)
    assert not monitor.sums.any() and monitor.read() == [None] * 3, "rows attended whole are no samples"
    for index in range(SHAPES[0][0]):
        monitor.sums[2, index] = torch.tensor([1.5, 2.0])
    assert monitor.read() == [None, None, 0.75]
    monitor.reset()
    assert monitor.read() == [None] * 3 and not monitor.step.any()


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"sparse.recall_monitor_every_steps: -1; allowed: 0 or more"):
        SparseConfig(recall_monitor_every_steps=-1)
    with pytest.raises(ConfigError, match=r"recall_monitor_every_steps: 9 with decode_policy='dense'"):
        SparseConfig(recall_monitor_every_steps=9, decode_policy="dense", prefill_policy="vertical_slash")


@pytest.mark.seam
@pytest.mark.engine
def test_the_engine_samples_every_so_many_steps_in_each_layer(tiny, caplog):
    found, answers = {}, {}
    for policy, budget in (("oracle", 128), ("random", 128), ("random", 1024)):
        settings = {
            "decode_policy": policy,
            "budget_tokens": budget,
            "recall_monitor_every_steps": 3,
            "dense_layers": 1,
        }
        with tiny.start(sparse=settings) as llm:
            answers[policy, budget] = tokens(llm, prompts((700, 500, 20)), 19)
            (shares,) = metrics.snapshot()["recall_by_layer"]
            layers = engine_core(llm).vllm_config.compilation_config.static_forward_context.values()
            monitor = next(layer.impl.workspace.monitor for layer in layers if hasattr(layer, "impl"))
            steps = int(monitor.step)
            rows = monitor.sums[..., 1].tolist()
        found[policy, budget] = shares
        if budget == 128:
            assert shares[0] is None, "a dense layer chooses nothing"
            assert 18 <= steps < 40 and rows == [[0, 0], [steps // 3] * 2, [steps // 3] * 2]
            assert all(0 < share < 1 for share in shares[1:])
        else:
            assert shares == [None] * 3, "everything is attended"
    assert min(found["oracle", 128][1:]) > max(found["random", 128][1:])
    with tiny.start(sparse={"decode_policy": "oracle", "budget_tokens": 128, "dense_layers": 1}) as llm:
        assert tokens(llm, prompts((700, 500, 20)), 19) == answers["oracle", 128], (
            "the recall monitor changed an answer"
        )
        assert metrics.snapshot()["recall_by_layer"] == []


def test_reports_begin_anew_after_reset(monkeypatch):
    """What was measured in warm-up does not silence the first real samples."""
    lines = []
    monkeypatch.setattr(recall_monitor.logger, "info", lambda text, *values: lines.append(text % values))
    monitor = RecallMonitor.allocate(1, 2, 4, 2, torch.device("cpu"))
    for samples in (100.0, 4.0):
        monitor.sums[..., 0], monitor.sums[..., 1] = samples / 2, samples
        for _ in range(2 * REPORT_STEPS):
            monitor.advance()
        monitor.reset()
    assert len(lines) == 2 and all("held 50.0%" in line for line in lines)

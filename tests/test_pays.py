"""From which context it pays: crossings, forecasts from committed rows, and what a measurement runs."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import kernel_rows
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.tools import measure, pays
from vllm_sparse.tools.pays import Pays, Point, crossing, forecast

CONFIG = SparseConfig(decode_policy="quest", budget_tokens=128, min_context_tokens=0)
SHAPE = AttentionShape(torch.device("cpu"), torch.float32, Geometry(4, 2, 64, 16, 0.125), torch.float32)


def points(*gains: float) -> list[Point]:
    return [Point(1000 * (index + 1), 10 + gain, 10.0) for index, gain in enumerate(gains)]


def test_crossings():
    assert crossing(points(-1, 1, 3)) == 1500
    assert crossing(points(2, 3)) == 1000
    assert crossing(points(-2, -1)) is crossing([]) is crossing(points(1, -1)) is None
    assert crossing(points(1, -1, 1)) == 2500, "where it stays the faster one"


def test_rows_are_those_of_the_benchmarks():
    assert pays.ROWS.read_text() == kernel_rows.text(), "run `python -m benchmarks.kernel_rows`"


def test_a_forecast_at_a_measured_context_is_what_was_measured():
    row = next(row for row in pays.committed() if row["gpu"] == "NVIDIA H200" and row["batch_spec"] == "1q1s128k"
               and row["kv_dtype"] == "bf16" and row["summary"] == "key_range")  # fmt: skip
    found = forecast("NVIDIA H200", "key_range", "bf16", 4096, [131072])
    assert found.points == (Point(131072, row["stock_us"], row["sparse_us"]),) and not found.measured
    assert "NVIDIA H200" in found.source and "rows" in found.source
    assert "H100" in forecast("NVIDIA H100 80GB HBM3", "key_range", "bf16", 4096, [8192]).source
    assert forecast(None, "no such summary", "bf16", 4096, [8192]) is None


def test_what_is_said():
    never = Pays(tuple(points(-2, -1)), "a test", True, None)
    assert never.describe(30, 4096)[1] == "does not pay up to 2,000 tokens of context"
    early = Pays(tuple(points(2, 3)), "a test", True, 1000)
    assert "from about 4,097 tokens" in early.describe(30, 4096)[1], "shorter contexts run dense"
    assert "+0.09 ms a step in 30 layers" in early.describe(30, 4096)[-1]


def test_what_is_measured_computes_attention(monkeypatch):
    """On a CPU, with references in the place of kernels, and plain torch in that of stock vLLM."""
    attended = []

    def stock(shape, cache, new, query, out, block_table, seq_lens, slot):
        attended.append(query)
        return lambda: query.sum()

    def clock(runs):
        begin = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - begin) * 1e6 / len(runs)

    monkeypatch.setattr(measure, "stock_step", stock)
    monkeypatch.setattr(measure, "MOST_LAYERS", 2)
    found = measure.measure(SHAPE, CONFIG, [512, 1024], "a test", clock)
    assert found.measured and [point.context_tokens for point in found.points] == [512, 1024]
    assert len(attended) == 4 and all(point.stock_us < point.sparse_us for point in found.points)


def test_a_measured_step_chooses_its_budget(monkeypatch):
    tables = []

    def attend(q, kv, table, geometry, out, *others):
        tables.append(table.lengths.tolist())
        return sparse_decode(q, kv, table, geometry, out, *others)

    sparse_decode = reference.sparse_decode
    monkeypatch.setattr(reference, "sparse_decode", attend)
    monkeypatch.setattr(measure, "stock_step", lambda *_: None)
    measure.layer_step(SHAPE, CONFIG, 512).run_sparse()
    assert tables == [[128, 128]], "the chosen pages of each KV head"


def test_contexts_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr(measure, "MOST_BYTES", 1 << 10)
    with pytest.raises(ConfigError, match="--measure: "):
        measure.measure(SHAPE, CONFIG, [512], "a test", lambda runs: 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_measured_on_a_gpu(kv_dtype):
    pytest.importorskip("vllm")
    shape = AttentionShape(torch.device("cuda"), torch.bfloat16, Geometry(32, 8, 128, 16, 128**-0.5), kv_dtype)
    config = SparseConfig(decode_policy="quest")
    began = time.monotonic()
    found = measure.measure(shape, config, [8192, 32768, 131072], "this GPU", measure.graph_us)
    assert time.monotonic() - began < 60
    long = found.points[-1]
    assert long.stock_us > 1.5 * long.sparse_us > 0 and found.from_tokens < 131072

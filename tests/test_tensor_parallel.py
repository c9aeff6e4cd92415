"""KV heads split over two workers of mp or ray: each selects for its own heads, answers stay the same."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from process import running
from tiny_engine import prompts

from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.prefill import patterns
from vllm_sparse.prefill.patterns import PatternTable

pytestmark = [pytest.mark.engine, pytest.mark.processes]

LENGTHS = (1, 40, 300)
TESTS = Path(__file__).parent
WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""As in production, but for binding threads to cores, of which a small machine has too few."""
SPARSE = {"budget_tokens": 2048, "dense_layers": 1, "min_context_tokens": 0}
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")


def run(tmp_path, model, ray=False, environment=None, **llm) -> tuple[list[list[int]], list[dict]]:
    """Tokens, and what each worker says of itself, of an LLM in a fresh process."""
    log = tmp_path / "log"
    request = {"model": str(model), "lengths": LENGTHS, "ray": ray, "llm": llm}
    command = [sys.executable, TESTS / "run_parallel.py", json.dumps(request)]
    with running(command, log, **WORKERS, **(environment or {})) as process:
        status = process.wait(400)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    assert status == 0 and len(lines) == 1, log.read_text()[-6000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.seam
def test_two_ranks_halve_the_heads(tiny, tmp_path):
    """Two ranks give stock tokens, each with half of the heads."""
    shares = (0.25, 0.5, 0.75, 1.0)
    table = PatternTable(tuple(HeadPattern(top_p=share) for share in shares), ((0, 1, 2, 3), (3, 2, 1, 0), None))
    patterns.write(tmp_path / "patterns.json", table, 4)
    sparse = {
        **SPARSE,
        "prefill_policy": "vertical_slash",
        "prefill_top_p": 0.125,
        "head_patterns": str(tmp_path / "patterns.json"),
    }
    answer, workers = run(
        tmp_path, tiny.model(), additional_config={"sparse": sparse},
        tensor_parallel_size=2, distributed_executor_backend="mp",
    )  # fmt: skip
    assert answer == tiny.stock(prompts(LENGTHS))
    assert [worker["top_ps"] for worker in workers] == [[[1, 0.75], [0.125] * 2], [[0.5, 0.25], [0.125] * 2]]
    for worker in workers:
        assert worker["kv_heads"] == [1, 1, 1]
        assert worker["sparse_layers"] == 2 and worker["dense_layers"] == {"dense_layers=1": 1}
        assert worker["attended_tokens"] == worker["context_tokens"] > 0


@needs_ray
def test_ray_workers_share_one_kv_head(tiny, tmp_path):
    """The settings come from a file that the environment names."""
    model = tiny.model(num_key_value_heads=1)
    file = tmp_path / "sparse.json"
    file.write_text(json.dumps(SPARSE))
    answer, workers = run(
        tmp_path, model, ray=True, environment={"VLLM_SPARSE_CONFIG": str(file)},
        tensor_parallel_size=2, distributed_executor_backend="ray",
    )  # fmt: skip
    assert answer == tiny.stock(prompts(LENGTHS), model=model)
    assert len(workers) == 2
    for worker in workers:
        assert worker["kv_heads"] == [1, 1, 1], "each has its copy of the only head"
        assert worker["sparse_layers"] == 2 and worker["dense_layers"] == {"dense_layers=1": 1}
        assert worker["attended_tokens"] == worker["context_tokens"] > 0

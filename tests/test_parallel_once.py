"""Several engines or stages, and ``vllm serve`` on ray; on one vLLM release only, as each start takes its time."""

from __future__ import annotations

import sys

import pytest
from test_tensor_parallel import LENGTHS, SPARSE, TESTS, WORKERS, check_server, needs_ray, run
from tiny_engine import prompts
from tiny_server import serve

pytest.importorskip("vllm")

WARM = {"VLLM_CPU_CI_ENV": None, "VLLM_USE_AOT_COMPILE": "0"}
"""vLLM's CPU runner makes what pipeline stages pass on in its warm-up, which it skips for eager engines."""


def test_pipeline_stages_give_stock_tokens_each_with_its_layers(tiny, tmp_path):
    model = tiny.model(num_hidden_layers=4)
    answer, workers = run(
        tmp_path, model, environment=WARM, additional_config={"sparse": SPARSE},
        pipeline_parallel_size=2, distributed_executor_backend="mp",
    )  # fmt: skip
    assert answer == tiny.stock(prompts(LENGTHS), model=model)
    assert [worker["sparse_layers"] for worker in workers] == [1, 2]
    assert [worker["dense_layers"] for worker in workers] == [{"dense_layers=1": 1}, {}]
    assert all(worker["attended_tokens"] == worker["context_tokens"] > 0 for worker in workers)


def test_server_of_two_engines(tiny, tmp_path):
    with serve(
        tmp_path, tiny.model(), SPARSE, "--data-parallel-size=2", "--api-server-count=1", **WORKERS
    ) as server:
        check_server(server, tiny, tiny.model())


@needs_ray
def test_server_of_two_ranks_on_ray(tiny, tmp_path):
    arguments = ("--tensor-parallel-size=2", "--distributed-executor-backend=ray")
    program = (
        sys.executable,
        TESTS / "logical_gpus.py",
    )
    with serve(
        tmp_path, tiny.model(), SPARSE, *arguments, program=program, RAY_DEDUP_LOGS="0", **WORKERS
    ) as server:
        check_server(server, tiny, tiny.model())

"""Pipeline stages on ray and several engines; on one vLLM release only, as each start takes its time."""

from __future__ import annotations

import sys

import pytest
from test_tensor_parallel import SPARSE, TESTS, WORKERS, check_server, needs_ray
from tiny_server import serve

pytest.importorskip("vllm")


@needs_ray
def test_server_of_two_pipeline_stages_on_ray(tiny, tmp_path):
    """The first stage has no sparse layer, the second one of each kind."""
    model = tiny.model(num_hidden_layers=4)
    arguments = ("--pipeline-parallel-size=2", "--distributed-executor-backend=ray", "--no-enforce-eager")
    environment = {
        "RAY_DEDUP_LOGS": "0",
        # vLLM's CPU runner makes what stages pass on in its warm-up, which it skips for eager engines.
        "VLLM_USE_AOT_COMPILE": "0",
        **WORKERS,
    }
    program = [sys.executable, TESTS / "logical_gpus.py"]
    sparse = {**SPARSE, "dense_layers": 3}
    with serve(tmp_path, model, sparse, *arguments, program=program, **environment) as server:
        check_server(server, tiny, model, dense_layers=3, count=1)


def test_server_of_two_engines(tiny, tmp_path):
    arguments = ("--data-parallel-size=2", "--api-server-count=1")
    with serve(tmp_path, tiny.model(), SPARSE, *arguments, **WORKERS) as server:
        check_server(server, tiny, tiny.model())

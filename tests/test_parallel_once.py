"""Pipeline stages on ray and several engines; on one vLLM release only, as each start takes its time."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_tensor_parallel import SPARSE, TESTS, WORKERS, needs_ray
from tiny_engine import prompts
from tiny_server import MAX_TOKENS, serve

pytest.importorskip("vllm")

pytestmark = [pytest.mark.engine, pytest.mark.processes]


def check_server(server, tiny, model, dense_layers: int = 1, count: int = 2) -> None:
    """Answers of stock vLLM to requests at once, and a log in which two workers know ``dense_layers`` and
    ``count`` of them, which have sparse layers, what was attended."""
    batch = prompts((300, 40, 1, 90), seed=11)
    expected = tiny.stock(batch, MAX_TOKENS, model=model)
    server.wait()
    with ThreadPoolExecutor(len(batch)) as clients:
        choices = list(clients.map(lambda prompt: server.choice("/v1/completions", prompt=prompt), batch))
    assert [choice["token_ids"] for choice in choices] == expected
    log = server.log.read_text()
    for told, workers in ((f"dense (dense_layers={dense_layers}: ", 2), ("tokens (100.0%)", count)):
        told_by = set(re.findall(rf"\((Worker\w* pid=\d+)\).*sparse attention: .*{re.escape(told)}", log))
        assert len(told_by) == workers, f"{told!r} is told by {told_by}"


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

"""Offload under tensor parallelism: each rank has a pool of its own, and the sum of them is what was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from process import running
from tiny_engine import prompts, tokens

pytestmark = [pytest.mark.engine, pytest.mark.processes]

PROMPTS = prompts((1, 40, 300, 500))
HOST_GIB = 0.03
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tiny_engine import ENGINE, prompts, tokens

def of_rank(worker):
    from vllm_sparse import metrics
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    store = next(layer.impl.pages.offloaded.store for layer in layers if hasattr(layer, "impl"))
    return {**metrics.snapshot(), "pool_bytes": store.pool.num_bytes, "heads": store.shape.kv_heads}

if __name__ == "__main__":
    from vllm import LLM
    llm = LLM(
        sys.argv[2], attention_backend="sparse", additional_config={"sparse": json.loads(sys.argv[3])},
        block_size=16, tensor_parallel_size=2, distributed_executor_backend="mp", **ENGINE,
    )
    answer = tokens(llm, prompts((1, 40, 300, 500)))
    cache = llm.llm_engine.vllm_config.cache_config
    print("RESULT", json.dumps([answer, cache.num_gpu_blocks, llm.collective_rpc(of_rank)]), flush=True)
"""


def test_two_ranks_offload_each_its_heads(tiny, tmp_path):
    with tiny.start(block_size=16) as llm:
        expected = tokens(llm, PROMPTS)
    script, log = tmp_path / "two_ranks.py", tmp_path / "log"  # workers are spawned, and import the main script
    script.write_text(SCRIPT)
    sparse = {"budget_tokens": 128, "min_context_tokens": 0, "offload": {"host_gib": HOST_GIB}}
    command = [sys.executable, script, Path(__file__).parent, tiny.model(), json.dumps(sparse)]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets collective_rpc send the function that counts
    }
    with running(command, log, **environment) as process:
        status = process.wait(400)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT")]
    assert status == 0 and len(lines) == 1, log.read_text()[-6000:]
    answer, num_blocks, ranks = json.loads(lines[0].removeprefix("RESULT"))
    assert answer == expected
    assert [rank["heads"] for rank in ranks] == [1, 1]
    assert num_blocks == int(HOST_GIB * 2**30) // 2 // (3 * 16 * 2 * 32 * 4)
    assert 0.99 * HOST_GIB < sum(rank["pool_bytes"] for rank in ranks) / 2**30 <= HOST_GIB
    for rank in ranks:
        assert 0 < rank["head_pages_fetched"] < rank["head_pages_looked_up"]
        assert rank["attended_tokens"] < rank["context_tokens"]

"""KV heads split over two spawned workers: each selects for its own heads, and answers stay the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from process import running
from tiny_engine import ENGINE, prompts

from vllm_sparse import pattern_table
from vllm_sparse.pattern_table import HeadPattern, PatternTable

pytestmark = pytest.mark.engine

PROMPTS = prompts((1, 40, 300))
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tiny_engine import ENGINE, prompts, tokens

def counts(worker):
    from vllm_sparse import metrics
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in layers.values()]
    shares = [impl.prefill.policy.patterns.coverage.tolist() for impl in impls if impl.dense_reason is None]
    return {**metrics.snapshot(), "kv_heads": [impl.num_kv_heads for impl in impls], "coverages": shares}

if __name__ == "__main__":
    from vllm import LLM
    assert not any(name.startswith("vllm_sparse.backend") for name in sys.modules)
    llm = LLM(
        sys.argv[2], attention_backend="sparse", additional_config={"sparse": json.loads(sys.argv[3])},
        block_size=32, tensor_parallel_size=2, distributed_executor_backend="mp", **ENGINE,
    )
    answer = tokens(llm, prompts((1, 40, 300)))
    print("RESULT", json.dumps([answer, llm.collective_rpc(counts)]), flush=True)
"""


def test_two_ranks_give_stock_tokens_each_with_half_of_the_heads(tiny, tmp_path):
    expected = tiny.stock(PROMPTS)
    script = tmp_path / "two_ranks.py"  # workers are spawned, and import the main script
    script.write_text(SCRIPT)
    shares = (0.25, 0.5, 0.75, 1.0)
    table = PatternTable(
        tuple(HeadPattern(coverage=share) for share in shares), ((0, 1, 2, 3), (3, 2, 1, 0), None)
    )
    pattern_table.write(tmp_path / "patterns.json", table, 4)
    sparse = {
        "budget_tokens": 2048,
        "dense_layers": 1,
        "min_context_tokens": 0,
        "prefill_policy": "vertical_slash",
        "prefill_coverage": 0.125,
        "head_patterns": str(tmp_path / "patterns.json"),
    }
    log = tmp_path / "log"
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
    answer, workers = json.loads(lines[0].removeprefix("RESULT"))
    assert answer == expected
    assert len(workers) == 2 and ENGINE["dtype"] == "float32"
    assert [counts["coverages"] for counts in workers] == [[[1, 0.75], [0.125] * 2], [[0.5, 0.25], [0.125] * 2]]
    for counts in workers:
        assert counts["kv_heads"] == [1, 1, 1]
        assert counts["sparse_layers"] == 2 and counts["dense_layers"] == {"dense_layers=1": 1}
        assert counts["attended_tokens"] == counts["context_tokens"] > 0

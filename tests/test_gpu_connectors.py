"""vLLM's own connectors to CPU memory on a GPU: blocks that have left it come back with their summaries."""

from __future__ import annotations

import pytest
from cases import ON_GPU
from test_gpu_engine import SPARSE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

LENGTHS = (3000, 2500, 700)
BYTES = 1 << 28


@pytest.mark.parametrize("connector", ["OffloadingConnector", "SimpleCPUOffloadConnector", "MultiConnector"])
def test_blocks_come_back_from_the_cpu(tmp_path, connector):
    pytest.importorskip("vllm")
    import tiny_model
    from tiny_engine import cached_tokens, outputs, prompts
    from vllm import LLM

    def transfer(name: str, **extra) -> dict:
        return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}

    config = transfer(connector, cpu_bytes_to_use=BYTES)
    if connector == "MultiConnector":
        config = transfer(connector, connectors=[transfer("OffloadingConnector", cpu_bytes_to_use=BYTES)])
    model = tiny_model.make(
        tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, initializer_range=0.05,
    )  # fmt: skip
    llm = LLM(
        str(model), dtype="float32",  # so that greedy tokens depend on no batch size
        max_model_len=4096, max_num_batched_tokens=1024, block_size=16,
        kv_cache_memory_bytes=256 << 20, gpu_memory_utilization=0.1, enforce_eager=True,
        attention_backend="sparse", additional_config={"sparse": SPARSE}, kv_transfer_config=config,
    )  # fmt: skip
    batch = prompts(LENGTHS)
    try:
        first = outputs(llm, batch)
        outputs(llm, prompts((40,), seed=5), 4)  # steps in which what is under way arrives
        assert llm.reset_prefix_cache()
        again = outputs(llm, batch)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert min(cached_tokens(again)) > 500, "nothing came back"
    answers = [[list(result.outputs[0].token_ids) for result in results] for results in (first, again)]
    assert answers[0] == answers[1]

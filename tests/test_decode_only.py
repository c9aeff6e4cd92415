"""Engines of ``benchmarks.engine --decode-only``: contexts that no prefill has computed."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import vllm
from test_hybrids import model_of
from tiny_engine import attention_layers, engine_core, kv_cache, outputs, prompts

from benchmarks import decode_only, engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        vllm.__version_tuple__ < (0, 32), reason="vLLM 0.31 has no kernels for the hybrid on a CPU"
    ),
]
CONTEXT, NUM_TOKENS = 700, 8


@pytest.mark.parametrize("backend", ["sparse", "CPU_ATTN"])
@pytest.mark.parametrize("case", ["llama", "granite4"])
def test_prompts_count_as_computed_over_random_keys(tiny, case, backend, monkeypatch):
    model, options = (tiny.model(), {"enable_prefix_caching": False}) if case == "llama" else model_of(tiny, case)
    args = engine.parse_args(["--decode-only"])
    options |= engine.without_prefill(args, engine.Side(backend, "auto"))
    with tiny.start(model, {"budget_tokens": 128}, backend, **options) as llm:
        context = engine_core(llm).vllm_config.compilation_config.static_forward_context
        caches = [tensor for layer in context.values() for tensor in decode_only.tensors_of(layer)]
        for cache in caches:
            cache.fill_(float("nan"))  # as memory may be that another process had
        steps = record_steps(llm, monkeypatch)
        llm.collective_rpc("fill_new_requests")
        results = outputs(llm, prompts((CONTEXT, 40)), NUM_TOKENS)
        assert [len(result.outputs[0].token_ids) for result in results] == [NUM_TOKENS] * 2
        assert steps == [2] * NUM_TOKENS, "the prompts were computed"
        # The bits of a sketch may be no number.
        assert backend == "sparse" or all(cache.isfinite().all() for cache in caches)
        for name, layer in attention_layers(llm).items():
            if not hasattr(layer.impl, "do_kv_cache_update"):
                continue
            rows = kv_cache(layer)[..., : layer.head_size].float().flatten(0, -2)
            random = ((rows.std(-1) - 1).abs() < 0.5).sum().item()
            assert random > (CONTEXT + 40) * layer.num_kv_heads, f"{name}: {random} keys"
        if backend == "sparse":
            (counts,) = llm.collective_rpc("sparse_metrics")
            # Prompts' last tokens are prefill to both of vLLM's runners, or decode: attended to in full or not.
            total = sum(CONTEXT + step + 40 + step for step in range(1, NUM_TOKENS))
            assert total <= counts["context_tokens"] <= total + CONTEXT + 40
            assert counts["attended_tokens"] < counts["context_tokens"] / 2


def record_steps(llm, monkeypatch) -> list[int]:
    """Fills with the tokens of each step from now on."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    steps, execute = [], runner.execute_model

    def record(scheduler_output, *args, **kwargs):
        if scheduler_output.total_num_scheduled_tokens:
            steps.append(scheduler_output.total_num_scheduled_tokens)
        return execute(scheduler_output, *args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", record)
    return steps

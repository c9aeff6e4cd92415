"""Features of vLLM beside sparse attention: each changes answers, or nothing, exactly as it does in stock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_engine import prompts, tokens

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

PROMPTS = prompts((5, 300))
EVERYTHING = {"budget_tokens": 2048}
RANK, HIDDEN, LAYERS = 8, 128, 3
PROJECTIONS = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128}
"""Outputs of those of the tiny Llama that an adapter changes."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A random LoRA adapter of the tiny Llama."""
    from safetensors.torch import save_file

    path, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(3)
    weights = {}
    for layer in range(LAYERS):
        for name, size in PROJECTIONS.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            weights[f"{at}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * 0.1
    save_file(weights, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(PROJECTIONS)}
    (path / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none", "task_type": "CAUSAL_LM"}))
    return path


def adapted(llm, adapter: Path) -> list[list[int]]:
    """Answers with an adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    batch = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    lora = LoRARequest("adapter", 1, str(adapter))
    results = llm.generate(batch, params, use_tqdm=False, lora_request=lora)
    return [list(result.outputs[0].token_ids) for result in results]


def test_lora(tiny, adapter):
    settings = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
    with tiny.start(backend="CPU_ATTN", **settings) as llm:
        expected = adapted(llm, adapter)
    without = tiny.stock(PROMPTS)
    assert expected != without, "the adapter changes nothing"
    with tiny.start(sparse=EVERYTHING, **settings) as llm:
        assert tokens(llm, PROMPTS) == without
        assert adapted(llm, adapter) == expected
        assert llm.collective_rpc("sparse_metrics")[0]["sparse_layers"] == LAYERS


def test_reloaded_weights(tiny):
    """As in training by reinforcement: pages of the old weights are forgotten with the prefix cache."""
    other = tiny.model(seed=7)
    before, expected = tiny.stock(PROMPTS), tiny.stock(PROMPTS, model=other)
    assert before != expected
    with tiny.start(sparse=EVERYTHING) as llm:
        assert tokens(llm, PROMPTS) == before
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert llm.reset_prefix_cache()
        assert tokens(llm, PROMPTS) == expected

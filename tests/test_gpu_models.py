"""Kinds of models on a GPU, with CUDA graphs: blocks of several pages, soft caps, sink logits, heads of 512, and
images whose tokens attend to later ones."""

from __future__ import annotations

import pytest
from cases import ON_GPU
from test_gpu_engine import GRAPHS, LENGTHS, SPARSE, answers_of, assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

EVERYTHING = {**SPARSE, "budget_tokens": 4096, "dense_layers": 0}
FEW = {**SPARSE, "dense_layers": 0, "recall_monitor_every_steps": 4}
STATES = {"enable_prefix_caching": False}
JAMBA = {
    "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
}  # fmt: skip
CASES = ("sinks", "soft_cap", "granite4", "lfm2", "jamba", "gemma4", "gemma3")


@pytest.fixture(scope="module", params=CASES)
def answer(request, tmp_path_factory):
    pytest.importorskip("vllm")
    import test_families
    import test_hybrids
    import test_models
    import tiny_engine
    import tiny_images
    import tiny_model

    case, path = request.param, tmp_path_factory.mktemp("models") / request.param
    prompts, options = None, {}
    if case == "gemma3":
        tiny_images.make(path, case)
        texts = enumerate(tiny_engine.prompts(LENGTHS))
        prompts = [tiny_images.prompt(case, text, seed) for seed, text in texts]
        options = {"limit_mm_per_prompt": {"image": 1}}
    elif case == "jamba":
        tiny_model.make(path, case, **JAMBA)
        options = STATES
    elif case in test_families.MODELS:
        model = test_families.MODELS[case]
        tiny_model.make(path, model.model_type, **model.settings)
        options = model.options
    else:
        options = STATES if case in test_hybrids.MODELS else {}
        model_type, settings, *_ = {**test_models.MODELS, **test_hybrids.MODELS}[case]
        tiny_model.make(path, model_type, **settings)
    run = answers_of(path, prompts)
    return lambda *args, **more: run(*args, **{**options, **more})


def test_a_budget_of_the_context_answers_as_stock_does(answer):
    stock = answer(None, attention_backend="TRITON_ATTN")
    for settings in ({}, {"compilation_config": GRAPHS}):
        found = answer(EVERYTHING, **settings)
        assert found.counts["sparse_layers"] > 0
        assert_same(found, stock)


def test_graphs_replay_eager(answer):
    graphs, eager = (answer(FEW, **settings) for settings in ({"compilation_config": GRAPHS}, {}))
    assert_same(graphs, eager)
    assert graphs.counts["attended_tokens"] < 0.7 * graphs.counts["context_tokens"]
    assert not graphs.waits, graphs.waits[:3]


@pytest.mark.parametrize("answer", ["granite4", "lfm2", "jamba"], indirect=True)
def test_pages_on_the_host_answer_as_those_on_the_gpu(answer):
    """Beside states, which stay there."""
    resident = answer({**SPARSE, "dense_layers": 0}, compilation_config=GRAPHS)
    offloaded = {**SPARSE, "dense_layers": 0, "offload": {"host_gib": 0.5}}
    for settings in ({}, {"compilation_config": GRAPHS}):
        found = answer(offloaded, **settings)
        assert_same(found, resident)
        assert 0 < found.counts["head_pages_fetched"] < found.counts["head_pages_looked_up"]
        assert not found.waits, found.waits[:3]

"""Kinds of models on a GPU, with CUDA graphs: blocks of several pages, soft caps and sink logits."""

from __future__ import annotations

import pytest
from cases import ON_GPU
from test_gpu_engine import GRAPHS, SPARSE, answers_of, assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

EVERYTHING = {**SPARSE, "budget_tokens": 4096, "dense_layers": 0}
FEW = {**SPARSE, "dense_layers": 0, "recall_monitor_every_steps": 4}
CASES = {"gpt_oss": "sinks", "gemma2": "soft_cap", "granite4": "hybrid", "lfm2": "hybrid"}


@pytest.fixture(scope="module", params=CASES)
def answer(request, tmp_path_factory):
    pytest.importorskip("vllm")
    import test_hybrids
    import test_models
    import tiny_model

    if CASES[request.param] == "hybrid":
        model_type, settings, *_ = test_hybrids.MODELS[request.param]
    else:
        model_type, settings, *_ = test_models.MODELS[CASES[request.param]]
    run = answers_of(tiny_model.make(tmp_path_factory.mktemp("models") / model_type, model_type, **settings))
    options = {"enable_prefix_caching": False} if CASES[request.param] == "hybrid" else {}
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

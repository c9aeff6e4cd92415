"""Architectures that stopped, or answered wrongly without a word: each starts and answers as stock vLLM."""

from __future__ import annotations

import pytest
import torch
from tiny_engine import attention_layers, engine_core, kv_cache, outputs, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.support import Treatment

pytestmark = [pytest.mark.engine, pytest.mark.seam]

PROMPTS = prompts((1, 5, 300))
EVERYTHING = {"budget_tokens": 2048}
LLAMA4 = {
    "attention_chunk_size": 64, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0],
    "interleave_moe_layer_step": 100, "moe_layers": [], "num_local_experts": 2, "num_experts_per_tok": 1,
    "intermediate_size_mlp": 256, "attn_temperature_tuning": False, "use_qk_norm": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings", "sparse", "reason"),
    [("llama4_text", LLAMA4, 1, "ChunkedLocalAttention")],
    ids=["llama4"],
)
def test_answers_are_those_of_stock(tiny, caplog, model_type, settings, sparse, reason):
    model = tiny.model(model_type, **settings)
    expected = tiny.stock(PROMPTS, model=model)
    with tiny.start(model, EVERYTHING) as llm:
        assert tokens(llm, PROMPTS) == expected
        counts = llm.collective_rpc("sparse_metrics")[0]
    assert counts["sparse_layers"] == sparse
    assert any(reason in text for text in counts["stock_layers"])


def test_an_engine_without_sparse_layers_says_so_aloud(tiny, monkeypatch):
    from vllm_sparse.backend import hooks

    said = []
    monkeypatch.setattr(hooks.logger, "warning", lambda text, *values: said.append(text % values))
    with tiny.start(tiny.model("bloom", n_layer=3, n_head=4, tie_word_embeddings=True)):
        pass
    (line,) = said
    assert "does NOTHING in this engine: 0 of 3 attention layers sparse" in line and "ALiBi" in line


def test_full_attention_beside_wider_sliding_windows(tiny):
    """Blocks of the full layers are padded to those of the windows, which a head page must step over."""
    settings = {
        "tie_word_embeddings": True, "embedding": 0.05, "sliding_window": 64, "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    model = tiny.model("gemma3_text", **settings)
    expected = tiny.stock(PROMPTS, model=model)
    with tiny.start(model, EVERYTHING) as llm:
        assert tokens(llm, PROMPTS) == expected
        assert {layer.sparse_support.treatment for layer in attention_layers(llm).values()} == {
            Treatment.SPARSE, Treatment.STOCK,
        }  # fmt: skip
    with tiny.start(model, {**EVERYTHING, "dense_layers": 1}) as llm:
        counts = llm.collective_rpc("sparse_metrics")[0]
    assert (counts["sparse_layers"], counts["dense_layers"]) == (1, {"dense_layers=1": 1}), (
        "of full layers, in order"
    )


def test_a_cache_that_kernels_cannot_read_stops_the_start(tiny, monkeypatch):
    from vllm_sparse.backend.residency import ResidentPages
    from vllm_sparse.errors import ConfigError

    monkeypatch.setattr(ResidentPages, "cache_slots", 48)
    with (
        pytest.raises(
            ConfigError, match=r"cannot serve layer model\.layers\.0.*48 rows.*another --attention-backend"
        ),
        tiny.start(),
    ):
        pass


DRAFT = {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_attention_heads": 2, "seed": 1}


@pytest.mark.parametrize("asked", [False, True], ids=["stock_drafts", "sparse_drafts"])
def test_a_draft_model_of_half_the_heads(tiny, asked, monkeypatch):
    said = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *values: said.append(text % values))
    model = tiny.model()
    expected = tiny.stock(PROMPTS, model=model)
    drafts = {"method": "draft_model", "model": str(tiny.model(**DRAFT)), "num_speculative_tokens": 2}
    if asked:
        drafts["attention_backend"] = "SPARSE"
    with tiny.start(model, EVERYTHING, speculative_config=drafts) as llm:
        assert tokens(llm, PROMPTS) == expected
        (counts,) = llm.collective_rpc("sparse_metrics")
        backends = [layer.attn_backend.get_name() for layer in attention_layers(llm).values()]
    assert counts["sparse_layers"] == backends.count("SPARSE") == (4 if asked else 3)
    assert counts["dense_verification_steps"] == 0
    assert counts["attended_tokens"] == counts["context_tokens"] > 0
    assert len([line for line in said if "up to 2 drafts of a request verified sparsely" in line]) == 1


def test_prompt_tokens_are_prefill_whatever_the_chunk(tiny):
    """A chunk of one token, of a cold prompt or one out of the cache, attends to its whole context."""
    prompt = prompts((321,), seed=9)
    answers = []
    for chunk in (256, 160, 64):
        with tiny.start(sparse={"budget_tokens": 128}, max_num_batched_tokens=chunk, block_size=16) as llm:
            cold, warm = outputs(llm, prompt, 6), outputs(llm, prompt, 6)
            (counts,) = llm.collective_rpc("sparse_metrics")
        assert warm[0].num_cached_tokens == 320
        answers += [list(result[0].outputs[0].token_ids) for result in (cold, warm)]
        assert counts["context_tokens"] == 2 * sum(range(322, 327)), "prompt tokens are no decode steps"
    assert all(answer == answers[0] for answer in answers)


def test_what_steps_need_survives_sleep(tiny):
    """Sleep itself needs a GPU: here everything that it would discard is poisoned between saving and waking."""
    from vllm_sparse.backend import sleep

    sparse = {
        "budget_tokens": 128,
        "recall_monitor_every_steps": 3,
        "prefill_policy": "vertical_slash",
        "min_prefill_tokens": 0,
    }
    with tiny.start(sparse=sparse, enable_prefix_caching=False) as llm:
        worker = engine_core(llm).model_executor.driver_worker.worker
        before, (counts,) = tokens(llm, PROMPTS), llm.collective_rpc("sparse_metrics")
        sleep.save(worker)
        held = sleep.tensors_of(worker)
        assert len(held) > 20
        for tensor in [*held, *(kv_cache(layer) for layer in attention_layers(llm).values())]:
            tensor.view(torch.uint8).fill_(0x5A) if tensor.is_contiguous() else tensor.fill_(float("nan"))
        sleep.restore(worker, ["kv_cache"])
        assert llm.collective_rpc("sparse_metrics")[0] != counts, "restored while weights are asleep"
        sleep.restore(worker, ["weights"])
        assert llm.collective_rpc("sparse_metrics")[0] == counts
        assert tokens(llm, PROMPTS) == before
        assert llm.collective_rpc("sparse_metrics")[0]["context_tokens"] == 2 * counts["context_tokens"]


def test_waking_puts_no_old_weights_back(tiny):
    """Weights may be loaded anew between two parts of a wake-up, as in training by reinforcement."""
    import test_models

    from vllm_sparse.backend import sleep

    with tiny.start(test_models.model_of(tiny, "sinks")) as llm:
        worker = engine_core(llm).model_executor.driver_worker.worker
        sleep.save(worker)
        sinks = [
            one.impl.sink_logits for one in attention_layers(llm).values() if hasattr(one.impl, "sink_logits")
        ]
        assert sinks
        for logits in sinks:
            logits.data.fill_(3)
        sleep.restore(worker, None)
        assert all((logits == 3).all() for logits in sinks)

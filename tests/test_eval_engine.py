"""`vllm-sparse eval` through the engine: turns over the prefix cache, and two settings compared by the command."""

from __future__ import annotations

import json

import pytest
import torch
from eval_cases import running_text

from vllm_sparse.tools import cli
from vllm_sparse.tools.eval import many_turns, run
from vllm_sparse.tools.eval.samples import Samples
from vllm_sparse.tools.eval.tasks import PREFILL_TEXT


@pytest.fixture
def evaluate(tiny, monkeypatch, tmp_path):
    """Run the command on a tiny model that answers nonsense; returns its rows."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # which the command sets, here for all later tests
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text, out = tmp_path / "text.txt", tmp_path / "eval.jsonl"
    text.write_text(running_text(400))

    def call(*options: str) -> list[dict]:
        fixed = ["--text", str(text), "--out", str(out), "--dtype", "float32", "--block-size", "16"]
        assert cli.main(["eval", str(tiny.model(seed=1)), *fixed, *options]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return call


@pytest.mark.seam
@pytest.mark.engine
def test_compare_new_tasks(evaluate, monkeypatch, capfd):
    """Turns find sparse answers in the cache, and the time is told before."""
    monkeypatch.setattr(many_turns, "TURNS", 3)
    rows = evaluate(
        "--sparse", '{"dense_layers": 0}', "--compare", "dense", "oracle:256", "--lengths", "2200",
        "--needles", "2", "--tasks", "many_turns,mrcr_2", "--batch", "2",
    )  # fmt: skip
    assert [row["policy"] for row in rows] == 2 * (["dense"] * 2 + ["oracle"] * 2)
    for row in rows:
        assert 0 <= row["score"] <= 1 and row["more"] is None
        assert row["attended"] == 1 if row["policy"] == "dense" else 0.1 < row["attended"] < 0.25
        if row["task"] == "many_turns":
            assert len(row["turns"]) == 3 and len(row["expected"]) == 12
            # Whole pages of an answer: more than half of the tokens of all answers but the last.
            assert 0.5 < row["reused"] / (row["generated"] * 2 / 3) <= 1
        else:
            assert "turns" not in row
    said = capfd.readouterr().out
    assert "8 results: " in said and " tokens to prefill, at most " in said
    assert "tokens/s of prefill" in said and "a decode step of 2 requests" in said
    assert (
        said.index("a decode step") < said.index("less dense") < said.index("oracle 256 less dense, on the same")
    )


@pytest.mark.engine
def test_prompts_too_short_for_auto(evaluate):
    """Prefill that is automatic is dense in an engine all of whose prompts are shorter than it asks for."""
    auto = {"decode_policy": "quest", "budget_tokens": 128, "prefill_policy": "auto"}
    options = ["--lengths", "700", "--needles", "1", "--tasks", "niah_single_2", "--sparse", '{"dense_layers": 0}']
    rows = evaluate(*options, "--compare", "dense", json.dumps(auto))
    assert [row["prefill_policy"] for row in rows] == ["dense", "auto"]
    assert rows[1]["prefill_density"] is None and rows[1]["attended"] < 0.3


@pytest.mark.seam
@pytest.mark.engine
def test_texts_are_scored_in_prefill(evaluate, tiny, monkeypatch, capfd, tmp_path):
    """Tokens of prompts have the model's own loss in dense chunks, and in sparse ones that of their density."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(run, "FIRST_TOKENS", 256)
    rows = evaluate(
        "--sparse", '{"dense_layers": 0, "min_prefill_tokens": 256}', "--policies", "quest", "--budgets", "128",
        "--prefill-policies", "sampled_queries", "--top-p", "0.5,1", "--lengths", "700", "--passages", "2",
        "--tasks", "prefill_text", "--chunk", "256", "--batch", "2",
    )  # fmt: skip
    path = tiny.model(seed=1)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = (tmp_path / "text.txt").read_text()
    samples = Samples(AutoTokenizer.from_pretrained(path), text, "report", 2, 256)
    assert len(rows) == 2 * 2 * 3, "two passages, dense and sparse decode, three kinds of prefill"
    for seed in range(2):
        tokens = torch.tensor(samples.make(PREFILL_TEXT, 700, seed).tokens)
        assert len(tokens) == 699
        with torch.no_grad():
            logits = network(tokens[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[256:-1], tokens[257:], reduction="none")
        mine = [row for row in rows if row["seed"] == seed]
        for row in mine:
            exact = row["prefill_policy"] == "dense" or row["top_p"] == 1
            assert row["scored"] == 442 and len(row["run_losses"]) == 7 and row["attended"] is None
            assert row["dense_loss"] == pytest.approx(losses.mean().item(), abs=1e-3)
            assert (abs(row["loss"] - row["dense_loss"]) < 1e-3) == exact
            assert row["run_losses"][0] == pytest.approx(losses[:64].mean().item(), abs=1e-3) or not exact
            if row["prefill_policy"] != "dense":
                assert row["prefill_density"] == 1 if exact else 0.05 < row["prefill_density"] < 0.9
        # Decode has no part in it.
        assert len({(row["prefill_policy"], row["top_p"], row["loss"]) for row in mine}) == 3
    said = capfd.readouterr().out
    assert "prefill, loss - dense  density" in said and "prefill_text, loss in nats" in said


@pytest.mark.engine
def test_compare_offload_in_fp8(evaluate, capfd):
    """Offload beside dense attention on the GPU, over caches in fp8; rows say which setting offloads."""
    offload = {"decode_policy": "midbound", "budget_tokens": 128, "offload": {"host_gib": 0.25}}
    options = ["--lengths", "700", "--needles", "2", "--tasks", "niah_single_2", "--kv-cache-dtype", "fp8"]
    rows = evaluate(*options, "--compare", "dense", json.dumps(offload))
    assert [(row["policy"], row["kv_dtype"]) for row in rows] == [("dense", "fp8")] * 2 + [("midbound", "fp8")] * 2
    assert [row["more"] for row in rows] == [None] * 2 + [{"offload": {"host_gib": 0.25}}] * 2
    assert rows[0]["attended"] == 1 and rows[2]["attended"] < 0.3
    said = capfd.readouterr().out
    assert 'midbound 128, offload={"host_gib": 0.25} less dense' in said

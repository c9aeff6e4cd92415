"""Steps that ``benchmarks/engine.py`` times: those in which every request of a batch decodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import engine, shapes
from benchmarks.batch_spec import parse
from benchmarks.workers import Worker

TOKENS = 8


class Engine:
    """Requests with a token in each of their steps; ``steps`` says which take part in which step."""

    def __init__(self, steps: list[list[int]]):
        self.steps, self.names, self.counts = steps, [], {}

    def add_request(self, name, prompt, params) -> None:
        self.names.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps)

    def step(self) -> list:
        found = []
        for index in self.steps.pop(0):
            name = self.names[index]
            self.counts[name] = self.counts.get(name, 0) + 1
            output = SimpleNamespace(token_ids=[0] * self.counts[name])
            found.append(SimpleNamespace(request_id=name, outputs=[output]))
        return found


@pytest.mark.parametrize("alone", [0, 2])
def test_steps_of_all_requests_are_timed(alone):
    steps = [[]] + [[0]] * alone + [[0, 1]] * (TOKENS - alone) + [[1]] * alone
    found = engine.time_batch(Engine(steps), parse("2q1s64"), None, TOKENS // 2)
    assert found["steps"] == TOKENS - alone - 1
    assert found["ttft_ms"] > 0 and found["tpot_ms"] > 0


def test_batch_in_turns_is_not_timed():
    """A batch that takes turns is not timed."""
    steps = [[0]] * TOKENS + [[1]] * TOKENS
    found = engine.time_batch(Engine(steps), parse("2q1s64"), None, TOKENS // 2)
    assert "may not hold" in found["reason"]


FIELDS = """bench gpu vllm torch commit date shape mode tp batch context budget policy prefill_policy
prefill_density kv_dtype baseline_kv_dtype weights drafts default baseline_ms sparse_ms speedup kv_tokens
baseline_kv_tokens"""
ENVIRONMENT = {"gpu": "g", "vllm": "1", "torch": "2", "commit": "c", "date": "d"}


def measured(tpot_ms: float, kv_dtype: str) -> dict:
    times = {"tpot_ms": tpot_ms, "ttft_ms": 1e3 * tpot_ms, "p99_ms": tpot_ms, "prefill_density": None}
    return {
        "start_s": 9.0, "kv_dtype": kv_dtype, "weights": "fp8", "kv_tokens": 1 << 20, "budget": 2048,
        "policy": "midbound", "prefill_policy": "dense", "environment": ENVIRONMENT, "1q1s128k": times,
        "8q1s32k": {"reason": "no room"},
    }  # fmt: skip


def test_rows_and_table_compare_caches_of_one_dtype(capsys):
    """Rows have a stock engine of the same KV dtype beside them; the table has 16 bits beside fp8, too."""
    args = engine.parse_args(["--kv-cache-dtype", "fp8,auto", "--weights", "fp8", "1q1s128k", "8q1s32k"])
    sides = {
        engine.Side("FLASH_ATTN", "fp8"): measured(8.0, "fp8"),
        engine.Side("sparse", "fp8", 0, "{}"): measured(4.0, "fp8"),
        engine.Side("sparse", "auto", 0, "{}"): measured(5.0, "bf16"),
    }
    stock, sparse, wide = sides
    rows = engine.rows_of(args, sparse, sides[sparse], sides[stock])
    assert [row["bench"] for row in rows] == ["tpot", "ttft"]
    assert all(set(FIELDS.split()) <= set(row) for row in rows)
    assert {(row["kv_dtype"], row["baseline_kv_dtype"], row["speedup"]) for row in rows} == {("fp8", "fp8", 2.0)}
    assert engine.rows_of(args, wide, sides[wide], {}) == [], "stock did not run"
    engine.print_table(args, sides)
    said = capsys.readouterr().out
    assert "sparse, fp8 against stock, fp8" in said and "2.00x" in said
    assert "sparse, fp8 against sparse, bf16" in said and "1.25x" in said and "8q1s32k: no room" in said


@pytest.mark.parametrize(("shape", "layers"), [(shape, layers) for shape in shapes.SHAPES for layers in (None, 4)])
def test_vllm_takes_every_shape(shape, layers, monkeypatch):
    registry = pytest.importorskip("vllm.model_executor.models.registry")
    # To look at a class, vLLM starts a process that imports vLLM.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    config = pytest.importorskip("vllm.config").ModelConfig(
        str(shapes.model_of(shape, layers)), skip_tokenizer_init=True, dtype="bfloat16"
    )
    asked = shapes.SHAPES[shape][1]
    assert config.get_total_num_kv_heads() == asked["num_key_value_heads"]
    assert config.get_head_size() == asked["head_dim"]
    text = config.hf_text_config
    assert text.num_hidden_layers == (layers or asked["num_hidden_layers"])
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    assert len(kinds) == text.num_hidden_layers
    one_in = {"qwen3.5-27b": 4, "gpt-oss-20b": 2}.get(shape, 1)
    assert kinds.count("full_attention") == text.num_hidden_layers // one_in


WORKER = """
import sys, time
from pathlib import Path
from benchmarks.workers import report, wait_for_turn

name, fate = sys.argv[1:]
log = Path("turns")
report({"start_s": 1})
if fate == "fails":
    raise SystemExit(3)
log.open("a").write(f"{name} starts\\n")
wait_for_turn()
log.open("a").write(f"{name} begins\\n")
time.sleep(9 if fate == "hangs" else 0.2)
log.open("a").write(f"{name} ends\\n")
report({"1q1s8k": {"tpot_ms": 7}})
"""


@pytest.mark.parametrize("together", [True, False])
def test_engines_are_measured_one_after_the_other(together, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(engine, "Worker", lambda command, limit: Worker(fake(command[-1]), limit))
    fates = {"FLASH_ATTN": "ends", "{}": "hangs", '{"a": 1}': "fails", '{"b": 1}': "ends"}
    names = {}

    def fake(side: str) -> list[str]:
        which = engine.Side(*json.loads(side))
        key = which.settings or which.backend
        names[key] = f"{len(names)}"
        return [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})" + WORKER, names[key], fates[key]]

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    args = engine.parse_args(["--limit", "6", "--sparse", "{}", "--sparse", '{"a": 1}', "--sparse", '{"b": 1}'])
    args.together = together
    found = [found for _, found in engine.run(args, engine.sides_of(args))]
    done = {"start_s": 1, "1q1s8k": {"tpot_ms": 7}}
    assert found[0] == found[3] == done
    assert found[1] == {"start_s": 1, "reason": "killed after --limit 6 s"}
    assert found[2] == {"start_s": 1, "reason": "ended with code 3"}
    turns = (tmp_path / "turns").read_text().split("\n")[:-1]
    if together:
        assert sorted(turns[:3]) == ["0 starts", "1 starts", "3 starts"]
        assert turns[3:] == ["0 begins", "0 ends", "1 begins", "3 begins", "3 ends"]
    else:
        assert turns == [
            "0 starts", "0 begins", "0 ends", "1 starts", "1 begins", "3 starts", "3 begins", "3 ends"
        ]  # fmt: skip


def test_prompts_of_a_batch_leave_steps_for_all():
    assert engine.prefill_steps(parse("6q1s128k"), 8192) == 96 and engine.prefill_steps(parse("1q1s64"), 8192) == 1


def test_options_of_both_engines():
    asked = {"gdn_prefill_backend": "triton", "max_num_batched_tokens": 8192}
    args = engine.parse_args(["--engine-args", json.dumps(asked), "1q1s128k"])
    side = engine.Side("sparse", "fp8", 0, "{}")
    rows = engine.rows_of(args, side, measured(4.0, "fp8"), measured(8.0, "fp8"))
    assert args.engine_args == asked and all(row["engine_args"] == asked for row in rows)

"""A wrong configuration refuses to start, and says which key, which value and what is allowed."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import pytest
from tiny_engine import MIXED_LENGTHS, attention_layers, prompts, tokens

from vllm_sparse.config import ENV_CONFIG, SparseConfig
from vllm_sparse.errors import ConfigError

# Settings, and what the refusal must say.
WRONG = {
    "unknown_key": ({"budget": 128}, ["unknown key 'budget'", "Did you mean 'budget_tokens'?", "window_tokens"]),
    "misspelt_key": ({"dense_layer": 1}, ["'dense_layer'", "Did you mean 'dense_layers'?"]),
    "string_for_number": ({"budget_tokens": "128"}, ["sparse.budget_tokens", "a whole number", "'128'", "2048"]),
    "float_for_number": ({"budget_tokens": 128.0}, ["sparse.budget_tokens", "a whole number", "128.0"]),
    "bool_for_number": ({"dense_layers": True}, ["sparse.dense_layers", "a whole number", "True"]),
    "null_for_number": ({"window_tokens": None}, ["sparse.window_tokens", "a whole number", "None"]),
    "number_for_string": ({"attention_kernel": 3}, ["sparse.attention_kernel", "a string", "3"]),
    "no_budget": ({"budget_tokens": 0}, ["sparse.budget_tokens", "0"]),
    "negative_budget": ({"budget_tokens": -16}, ["sparse.budget_tokens", "-16"]),
    "negative_window": ({"window_tokens": -1}, ["sparse.window_tokens", "-1", "0 or more"]),
    "negative_sinks": ({"sink_tokens": -1}, ["sparse.sink_tokens", "-1", "0 or more"]),
    "negative_layers": ({"dense_layers": -2}, ["sparse.dense_layers", "-2", "0 or more"]),
    "negative_context": ({"min_context_tokens": -5}, ["sparse.min_context_tokens", "-5", "0 or more"]),
    "budget_below_window": (
        {"budget_tokens": 64, "window_tokens": 64},
        ["sparse.budget_tokens", "64", "sink_tokens=16", "window_tokens=64", "at least 112"],
    ),
    "negative_slash": ({"slash_tokens": -1}, ["sparse.slash_tokens", "-1", "0 or more"]),
    "prefill_top_p_above_1": ({"prefill_top_p": 95}, ["sparse.prefill_top_p", "95", "0 (fixed sizes) to 1"]),
    "string_for_share": ({"prefill_top_p": "0.9"}, ["sparse.prefill_top_p", "a number", "'0.9'", "0.98"]),
    "top_p_0": ({"top_p": 0}, ["sparse.top_p", "0", "above 0, up to 1"]),
    "unknown_prefill_policy": (
        {"prefill_policy": "vertical-slash"},
        ["sparse.prefill_policy", "'vertical-slash'", "Did you mean 'vertical_slash'?", "dense"],
    ),
    "unknown_policy": (
        {"decode_policy": "qest"},
        ["sparse.decode_policy", "'qest'", "Did you mean 'quest'?", "random"],
    ),
    "unknown_preset": (
        {"preset": "fats"},
        ["sparse.preset", "'fats'", "Did you mean 'fast'?", "balanced", "quality"],
    ),
    "number_for_preset": ({"preset": 1}, ["sparse.preset", "1"]),
    "list_for_preset": ({"preset": ["fast"]}, ["sparse.preset", "balanced", "quality"]),
    "unknown_engine": (
        {"attention_kernel": "tritn"},
        ["sparse.attention_kernel", "'tritn'", "Did you mean 'triton'?", "xformers"],
    ),
    "number_for_patterns": ({"head_patterns": 3}, ["sparse.head_patterns", "a string", "3"]),
    "wrong_patterns": (
        {"head_patterns": {"candidates": [], "patterns": [[0]]}},
        ["sparse.head_patterns", "has the pattern 0"],
    ),
    "number_for_budgets": ({"head_budgets": 2}, ["sparse.head_budgets", "a string", "2"]),
    "wrong_budgets": ({"head_budgets": {"shares": [[0]]}}, ["sparse.head_budgets", "has the share 0"]),
    "not_an_object": (["quest"], ["expected a JSON object", "['quest']"]),
}
wrong = pytest.mark.parametrize("case", WRONG)


def of_engine(additional: dict) -> SparseConfig:
    return SparseConfig.from_vllm(SimpleNamespace(additional_config=additional))


@wrong
def test_wrong_settings_are_refused(case):
    settings, said = WRONG[case]
    with pytest.raises(ConfigError) as refusal:
        of_engine({"sparse": settings})
    for words in said:
        assert words in str(refusal.value)


def test_presets():
    """A preset is other settings in one word, and keys that are given win."""
    policies = {
        name: of_engine({"sparse": {"preset": name}}).decode_policy for name in ("balanced", "quality", "fast")
    }
    assert policies == {"balanced": "sketch", "quality": "sketch2", "fast": "midbound"}
    assert of_engine({}) == of_engine({"sparse": {"preset": "balanced"}})
    assert of_engine({"sparse": {"preset": "fast", "decode_policy": "quest"}}).decode_policy == "quest"
    for config in (of_engine({"sparse": {"preset": "fast"}}), of_engine({"sparse": {"decode_policy": "oracle"}})):
        assert SparseConfig.from_mapping(config.to_mapping(), "a worker") == config


def test_smallest_budget():
    """Smallest allowed budget is the one that refusals name."""
    # Sinks 1 page; a window of 64 can touch 5 pages; one page to choose.
    smallest = {"budget_tokens": 112, "sink_tokens": 16, "window_tokens": 64}
    assert of_engine({"sparse": smallest}).budget_pages(16) == 7
    with pytest.raises(ConfigError, match="at least 112"):
        of_engine({"sparse": {**smallest, "budget_tokens": 111}})
    with pytest.raises(ConfigError, match=r"pages of 64 tokens.*at least 256"):
        SparseConfig(**smallest).check_page_size(64)


@pytest.mark.parametrize("page_size", [0, 8, 24, 40, 48, 512, -16])
def test_page_sizes(page_size):
    """Page sizes that kernels cannot use are refused."""
    with pytest.raises(ConfigError, match=f"--block-size: {page_size} is not a page size .* allowed: 16, 32, 64"):
        SparseConfig().check_page_size(page_size)


def test_environment_is_json_or_a_file(monkeypatch, tmp_path):
    """Environment gives the config as JSON or as a file."""
    settings = {"budget_tokens": 512, "decode_policy": "streaming"}
    monkeypatch.setenv(ENV_CONFIG, json.dumps(settings))
    assert of_engine({}) == SparseConfig(**settings)
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps({"budget_tokens": 768}))
    monkeypatch.setenv(ENV_CONFIG, str(path))
    assert of_engine({}) == SparseConfig(budget_tokens=768)
    monkeypatch.setenv(ENV_CONFIG, "  ")
    assert of_engine({}) == SparseConfig()
    monkeypatch.delenv(ENV_CONFIG)
    assert SparseConfig.from_vllm(SimpleNamespace(additional_config=None)) == SparseConfig()


def test_workers_need_no_file(monkeypatch, tmp_path):
    """The driver carries what a file says to workers that lack it."""
    pytest.importorskip("vllm")
    from vllm_sparse.backend import check

    path = tmp_path / "sparse.json"
    path.write_text(json.dumps({"budget_tokens": 768}))
    monkeypatch.setenv(ENV_CONFIG, str(path))
    vllm_config = SimpleNamespace(additional_config={"another plugin": 1}, model_config=None)
    config = SparseConfig.from_vllm(vllm_config)
    check.carry(vllm_config, config, check.with_tables(vllm_config, config), "head_patterns")
    monkeypatch.delenv(ENV_CONFIG)
    carried = json.loads(json.dumps(vllm_config.additional_config))
    assert of_engine(carried) == SparseConfig(budget_tokens=768)
    assert carried["another plugin"] == 1


def test_additional_config_wins(monkeypatch):
    monkeypatch.setenv(ENV_CONFIG, json.dumps({"budget_tokens": 512, "dense_layers": 7}))
    assert of_engine({"sparse": {"budget_tokens": 1024}}) == SparseConfig(budget_tokens=1024)
    assert of_engine({"sparse": {}}) == SparseConfig()
    assert of_engine({"another plugin": 1}).dense_layers == 7


@pytest.mark.parametrize(
    "text, said",
    [
        ("/nowhere/sparse.json", "'/nowhere/sparse.json' is neither a JSON object nor a readable file"),
        ("budget_tokens=128", "neither a JSON object nor a readable file"),
        ("[1, 2]", "neither a JSON object nor a readable file"),
        ('{"budget_tokens": 128', "not valid JSON"),
        ('{"budget": 128}', "Did you mean 'budget_tokens'?"),
    ],
)
def test_wrong_environment_is_refused(monkeypatch, text, said):
    monkeypatch.setenv(ENV_CONFIG, text)
    with pytest.raises(ConfigError) as refusal:
        of_engine({})
    assert said in str(refusal.value) and ENV_CONFIG in str(refusal.value)


@pytest.mark.parametrize("content", [b"budget_tokens: 128\n", b"\x89PNG\r\n\x1a\n\x00\xff", b"", b"[1]"])
def test_file_without_an_object_is_refused(monkeypatch, tmp_path, content):
    """File without a JSON object is refused by name."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    monkeypatch.setenv(ENV_CONFIG, str(path))
    with pytest.raises(ConfigError, match=rf"{ENV_CONFIG} \(file notes.txt\): (not valid JSON|expected a JSON)"):
        of_engine({})


def refused(tiny, **settings) -> str:
    """Why a configuration was refused before anything was built from it."""

    def build(*args, **kwargs):
        pytest.fail("the configuration was accepted")

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Exception, match="validation error") as refusal,
    ):
        patch.setattr("vllm.v1.engine.llm_engine.LLMEngine.__init__", build)
        with tiny.start(**settings):
            pass
    return str(refusal.value)


@pytest.mark.engine
@pytest.mark.parametrize("case", ["unknown_key", "bool_for_number", "budget_below_window", "unknown_policy"])
def test_engine_refuses_wrong_settings(tiny, case):
    """Engine refuses wrong settings before it builds anything."""
    settings, said = WRONG[case]
    message = refused(tiny, additional_config={"sparse": settings})
    for words in said:
        assert words in message


@pytest.mark.engine
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"block_size": 8}, ["--block-size: 8", "allowed: 16, 32, 64"]),
        ({"block_size": 64, "sparse": {"budget_tokens": 96}}, ["sparse.budget_tokens: 96", "pages of 64 tokens"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["--kv-cache-dtype: 'fp8_e5m2'", "allowed: auto, float32, fp8"]),
        ({"kv_cache_dtype": "bfloat16"}, ["--kv-cache-dtype: 'bfloat16'", "allowed: auto, float32"]),
    ],
    ids=["page_of_8", "budget_for_large_pages", "e5m2", "another_dtype"],
)
def test_engine_refuses_too_large_pages(tiny, settings, said):
    message = refused(tiny, **settings)
    for words in said:
        assert words in message


@pytest.mark.engine
@pytest.mark.parametrize("name", ["fa3", "triton", "xformers"])
def test_gpu_kernels_are_refused_on_a_cpu(tiny, name):
    """Engine that needs a GPU is refused on a CPU."""
    with (
        pytest.raises(
            ConfigError, match=f"sparse.attention_kernel: '{name}' .* needs a GPU.* Allowed here: auto, torch"
        ),
        tiny.start(sparse={"attention_kernel": name}),
    ):
        pass


@pytest.mark.engine
def test_engine_reads_the_environment(tiny, monkeypatch, tmp_path):
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps({"budget_tokens": 256, "dense_layers": 1}))
    monkeypatch.setenv(ENV_CONFIG, str(path))
    with tiny.start(additional_config={}) as llm:
        configs = {layer.impl.config for layer in attention_layers(llm).values()}
    # No prompt of this engine is long enough for sparse prefill.
    assert configs == {SparseConfig(budget_tokens=256, dense_layers=1, prefill_policy="dense")}


@pytest.mark.engine
def test_engine_survives_wrong_prompts(tiny):
    """Wrong prompts are refused and the engine still serves."""
    batch = prompts()
    expected = tiny.stock(batch)
    with tiny.start(sparse={"budget_tokens": 2048}) as llm:
        for prompt, said in ((prompts((1200,))[0], "1024"), ([], "empty"), ([600], "vocab")):
            with pytest.raises(Exception, match=said):
                tokens(llm, [prompt])
        assert tokens(llm, batch) == expected
    assert len(expected) == len(MIXED_LENGTHS)


@pytest.mark.engine
def test_default_page_size_on_a_cpu(tiny):
    """Page size defaults to 32 on a CPU."""
    with tiny.start(block_size=None) as llm:
        assert {layer.impl.page_size for layer in attention_layers(llm).values()} == {32}


@pytest.mark.parametrize("most, said", [(6, "more than 4 requests .* take 4 or 8"), (4, ""), (8, ""), (99, "")])
def test_batches_beyond_graphs_are_warned_of(most, said, caplog, monkeypatch):
    """Batches that no graph holds are warned of."""
    from vllm_sparse.backend.builder import warn_of_batches_without_graphs

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    warn_of_batches_without_graphs([1, 2, 4, 8], most)
    warn_of_batches_without_graphs([], most)
    assert bool(said) == bool(caplog.messages)
    assert not said or re.search(said, caplog.text)


def test_benchmark_batches_fit_in_graphs():
    """Benchmarks admit the batches that a graph holds, and no larger ones."""
    from benchmarks.batch_spec import max_num_seqs, parse

    found = {n: max_num_seqs([parse(f"{n}q1s8k"), parse("1q1s8k")]) for n in (1, 3, 4, 6, 8, 33)}
    assert found == {1: 1, 3: 4, 4: 4, 6: 8, 8: 8, 33: 40}

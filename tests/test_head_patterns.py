"""Patterns of heads from a file to the kernels: what is refused, who reads it, which rank takes which heads."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_config import refused
from tiny_engine import attention_layers, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.config import ENV_CONFIG, SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.prefill import patterns
from vllm_sparse.prefill.patterns import PatternTable

LAYERS, Q_HEADS = 3, 4
EVERYTHING, LITTLE = HeadPattern(top_p=1.0), HeadPattern(recent_tokens=32)
TABLE = PatternTable((EVERYTHING, LITTLE), ((0, 1, 1, 1), None, (0, 0, 0, 1)))
SLASH = {"prefill_policy": "vertical_slash"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deep" / "patterns.json"
    patterns.write(path, TABLE, Q_HEADS, model="some/model", tolerance=0.05)
    return path


def test_written_table_is_read_back(file):
    assert patterns.read(file, LAYERS, Q_HEADS) == TABLE
    assert json.loads(file.read_text())["model"] == "some/model"
    assert [path.name for path in file.parent.iterdir()] == ["patterns.json"]
    config = SparseConfig(**SLASH, head_patterns=str(file)).with_patterns("some/model", LAYERS, Q_HEADS)
    assert config.head_patterns == TABLE
    assert SparseConfig.from_mapping(json.loads(json.dumps(config.to_mapping())), "test") == config
    assert hash(config) != hash(SparseConfig(**SLASH))


def pattern(**changes) -> dict:
    return {"vertical_tokens": 0, "slash_tokens": 0, "recent_tokens": 0, "top_p": 0.5, **changes}


# Changes to a good file, and what the refusal must say of it.
STALE = {
    "format": ({"format": 2}, "has format 2, this needs 1"),
    "no_format": ({"format": None}, "has format None"),
    "layers": ({"num_layers": 4}, "has num_layers 4, this needs 3"),
    "heads": ({"q_heads": 8}, "has q_heads 8, this needs 4"),
    "rows": ({"patterns": [[0] * 4] * 2}, "does not have 3 rows of 4 patterns"),
    "row": ({"patterns": [[0] * 4, None, [0] * 3]}, "does not have 3 rows of 4 patterns"),
    "index": ({"patterns": [[0] * 4, None, [0, 0, 0, 2]]}, "has the pattern 2; allowed: 0 to 1"),
    "index_type": ({"patterns": [[0] * 4, None, [0, 0, 0, True]]}, "has the pattern True"),
    "no_rows": ({"patterns": {"0": [0]}}, "has no list of 'patterns'"),
    "no_candidates": ({"candidates": None}, "has no list of 'candidates'"),
    "unknown_field": ({"candidates": [pattern(block=1)] * 2}, "'block': 1"),
    "negative": ({"candidates": [pattern(), pattern(slash_tokens=-1)]}, "'slash_tokens': -1"),
    "share": ({"candidates": [pattern(), pattern(top_p=98)]}, "a top_p of 0 to 1"),
    "nan": ({"candidates": [pattern(), pattern(top_p=float("nan"))]}, "a top_p of 0 to 1"),
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("auto", [False, True], ids=["path", "auto"])
def test_foreign_file_is_refused(file, tmp_path, case, auto):
    """A file of something else is refused with its path and what to do."""
    changes, said = STALE[case]
    content = {**json.loads(file.read_text()), **changes}
    path = tmp_path / patterns.FILE_NAME if auto else file
    path.write_text(json.dumps(content))
    value = "auto" if auto else str(file)
    with pytest.raises(ConfigError) as refusal:
        SparseConfig(**SLASH, head_patterns=value).with_patterns(str(tmp_path), LAYERS, Q_HEADS)
    for words in ("sparse.head_patterns", repr(value), str(path), said, "none", "vllm-sparse tune"):
        assert words in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\x00\xff", None], ids=repr)
def test_file_without_an_object_is_refused(tmp_path, content):
    """A file that is no JSON object is refused."""
    path = tmp_path / "patterns.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not JSON|is not a JSON object|cannot be read"):
        SparseConfig(**SLASH, head_patterns=str(path)).with_patterns("model", LAYERS, Q_HEADS)


def test_only_vertical_slash_reads_patterns(file, tmp_path):
    """Patterns are consulted by ``vertical_slash`` alone, and only where asked for."""
    file.rename(tmp_path / patterns.FILE_NAME)
    model = str(tmp_path)
    assert SparseConfig(**SLASH).with_patterns(model, LAYERS, Q_HEADS).head_patterns == TABLE
    for settings in ({}, {"prefill_policy": "xattention"}, {**SLASH, "head_patterns": "none"}):
        assert SparseConfig(**settings).with_patterns(model, 99, 99) == SparseConfig(**settings)
    # Without a file, what the driver saw holds for workers that might see one.
    assert SparseConfig(**SLASH).with_patterns("no/model", 99, 99).head_patterns == "none"


@pytest.mark.parametrize("given", ["patterns.json", TABLE], ids=["path", "table"])
@pytest.mark.parametrize("policy", ["dense", "flex_prefill"])
def test_unread_patterns_are_refused(policy, given):
    with pytest.raises(ConfigError, match=r"head_patterns: .* would not be read by .*allowed with it: auto, none"):
        SparseConfig(prefill_policy=policy, head_patterns=given)


def test_auto_survives_forbidden_places(monkeypatch):
    """``auto`` takes a place that may not be looked at for one without patterns."""

    def forbidden(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.stat", forbidden)
    assert SparseConfig(**SLASH).with_patterns("org/model", LAYERS, Q_HEADS).head_patterns == "none"


def test_hub_models_use_the_cache(monkeypatch, tmp_path):
    """Hub names have their patterns in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = tmp_path / "cache" / "vllm-sparse" / "patterns" / "org--model.json"
    assert patterns.default_path("org/model") == expected
    snapshot = tmp_path / "models--org--model" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    assert patterns.default_path(str(snapshot)) == expected, "offline, vLLM puts the snapshot for the name"
    assert patterns.default_path(str(tmp_path)) == tmp_path / patterns.FILE_NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert patterns.default_path("m") == tmp_path / ".cache" / "vllm-sparse" / "patterns" / "m.json"


def test_ranks_take_their_heads():
    """Each rank takes its slice of the heads."""
    a, b = TABLE.candidates
    assert [TABLE.of_layer(0, rank, 4, 1) for rank in range(4)] == [[a], [b], [b], [b]]
    assert [TABLE.of_layer(2, rank, 2, 2) for rank in range(2)] == [[a, a], [a, b]]
    assert TABLE.of_layer(2, 0, 2, 4) == TABLE.of_layer(2, 1, 2, 4) == [a, a, a, b], "a layer that is not split"
    assert TABLE.of_layer(1, 0, 1, 4) is None, "a layer without patterns"
    assert TABLE.of_layer(3, 0, 1, 4) is None, "a layer that the model does not have: a draft's"
    assert TABLE.of_layer(0, 0, 1, 3) is TABLE.of_layer(0, 0, 1, 2) is TABLE.of_layer(0, 0, 1, 8) is None


def test_patterns_are_whole_pages():
    patterns = HeadPatterns.of([HeadPattern(1, 33, 0), HeadPattern(0, 0, 16, 0.25)], 16, torch.device("cpu"))
    assert patterns.sizes.tolist() == [[1, 0], [3, 0], [0, 1]] and patterns.sizes.dtype == torch.int32
    assert patterns.top_p.tolist() == [0, 0.25]
    uniform = HeadPatterns.of([SparseConfig(prefill_top_p=0).uniform_pattern] * 3, 16, torch.device("cpu"))
    assert uniform.sizes.tolist() == [[64] * 3, [128] * 3, [0] * 3]


def test_workers_need_no_file(file, monkeypatch):
    """The driver carries patterns to workers, whatever named them."""
    pytest.importorskip("vllm")
    from vllm_sparse.backend import check

    text = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=Q_HEADS)
    model = SimpleNamespace(model="some/model", hf_text_config=text)
    vllm_config = SimpleNamespace(additional_config={"another plugin": 1}, model_config=model)
    settings = {**SLASH, "head_patterns": str(file), "budget_tokens": 512}
    monkeypatch.setenv(ENV_CONFIG, json.dumps(settings))
    config = SparseConfig.from_vllm(vllm_config)
    check.carry(vllm_config, config, check.with_tables(vllm_config, config), "head_patterns")
    monkeypatch.delenv(ENV_CONFIG)
    file.unlink()
    carried = json.loads(json.dumps(vllm_config.additional_config))
    assert carried["another plugin"] == 1
    worker = SparseConfig.from_vllm(SimpleNamespace(additional_config=carried))
    assert worker == SparseConfig(**{**settings, "head_patterns": TABLE})
    assert worker.with_patterns("some/model", 99, 99) is worker, "a worker reads no file"


@pytest.mark.seam
@pytest.mark.engine
def test_engine_takes_the_models_file(tiny):
    """The model's file is taken by an engine, and left where ``none`` is said."""
    model = tiny.model(num_hidden_layers=LAYERS)
    patterns.write(model / patterns.FILE_NAME, TABLE, Q_HEADS)
    settings = {"decode_policy": "dense", "prefill_top_p": 1, "min_prefill_tokens": 256, **SLASH}

    def density(**changes) -> float:
        with tiny.start(model, {**settings, **changes}, enable_prefix_caching=False) as llm:
            tokens(llm, prompts((1000,)), 1)
            layers = attention_layers(llm).values()
            found.append([layer.impl.prefill.policy.patterns.top_p.tolist() for layer in layers])
            counts = metrics.snapshot()
        assert counts["prefill_causal_pairs"] == (LAYERS - changes.get("dense_layers", 0)) * Q_HEADS * sum(
            range(257, 1001)
        )
        return counts["prefill_attended_pairs"] / counts["prefill_causal_pairs"]

    found = []
    try:
        tuned = density()
        assert found[0] == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
        # 4 of 12 heads attend to little: less than a third of their pairs.
        assert 8 / 12 < tuned < 9.5 / 12
        assert density(head_patterns="none") == 1 and found[1] == [[1, 1, 1, 1]] * LAYERS
        message = refused(
            tiny, model=model, sparse={**settings, "head_patterns": str(model / "config.json")}
        )  # fmt: skip
        assert "sparse.head_patterns" in message and "config.json has format None" in message
    finally:
        (model / patterns.FILE_NAME).unlink()

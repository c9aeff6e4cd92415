"""What users write is read strictly, in bounds, and never ends in an exception of Python's own."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest

from vllm_sparse import user_text
from vllm_sparse.config import ENV_CONFIG, MOST, SparseConfig
from vllm_sparse.decode import budgets
from vllm_sparse.errors import ConfigError, TableError, TextError
from vllm_sparse.prefill import patterns
from vllm_sparse.user_text import parse_json, read_json, shown

DIGITS = "9" * 5000
DEEP = '{"a":' * 100_000
TEXTS = {
    "deep": (DEEP, "nested too deeply"),
    "digits": (f'{{"budget_tokens": {DIGITS}}}', "thousands of digits"),
    "twice": ('{"budget_tokens": 1, "budget_tokens": 2}', "the key 'budget_tokens' comes twice"),
    "twice inside": ('{"offload": {"host_gib": 1, "host_gib": 2}}', "the key 'host_gib' comes twice"),
    "comment": ('{"budget_tokens": 512} // more', "Extra data"),
    "comma": ('{"budget_tokens": 512,}', "double quotes"),
}
WHOLE = [name for name, field in SparseConfig.__dataclass_fields__.items() if field.type in ("int", "int | None")]


def of_environment(monkeypatch, text: str) -> SparseConfig:
    monkeypatch.setattr(os, "environ", {**os.environ, ENV_CONFIG: text})  # which holds no zero bytes
    return SparseConfig.from_vllm(SimpleNamespace(additional_config=None))


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_json(case, monkeypatch, tmp_path):
    """Texts that are no JSON are refused wherever they stand."""
    text, said = TEXTS[case]
    with pytest.raises(TextError, match=f"^not valid JSON .*{said}"):
        parse_json(text)
    path = tmp_path / "settings.json"
    path.write_text(text)
    for value in (text, str(path)):
        with pytest.raises(ConfigError, match=f"^{ENV_CONFIG}.*: not valid JSON .*{said}") as refusal:
            of_environment(monkeypatch, value)
        assert len(str(refusal.value)) < 500
    for key, read in (("head_budgets", "with_budgets"), ("head_patterns", "with_patterns")):
        config = SparseConfig(prefill_policy="vertical_slash", **{key: str(path)})
        with pytest.raises(ConfigError, match=f"^sparse.{key}: .* is not JSON .*{said}"):
            getattr(config, read)("m", 3, 2)


@pytest.mark.parametrize(
    "value, said",
    [
        ("~nobodyxyz/x", "No such file"), ("x" * 5000, "name too long"), ("é" * 300, "name too long"),
        ("/", "it is a directory"), ("/dev/null", "no regular file"), ("a\x00b", "null byte"),
        ("[" * 9000, "too long"), ("\ud800.json", ""),
    ],
    ids=range(8),
)  # fmt: skip
def test_unreadable_paths_take_one_sentence(value, said, monkeypatch):
    """Paths of any kind are refused in one sentence."""
    with pytest.raises(ConfigError, match=f"{ENV_CONFIG}: .* nor a readable file: it .*{said}") as refusal:
        of_environment(monkeypatch, value)
    assert len(str(refusal.value)) < 500
    with pytest.raises(ConfigError, match=f"sparse.head_budgets: .*{said}.* Allowed: auto, none") as refusal:
        SparseConfig(head_budgets=value).with_budgets("m", 3, 2)


def test_pipes_and_large_files_are_not_read(monkeypatch, tmp_path):
    """Pipes are not waited for and files of weights are not read."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"nor a readable file: it cannot be read \(it is no regular file"):
        of_environment(monkeypatch, str(tmp_path / "pipe"))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(user_text.MOST_FILE_BYTES + 1)
    with pytest.raises(TextError, match="67,108,865 bytes; allowed: up to 67,108,864"):
        read_json(tmp_path / "model.safetensors")


def test_byte_order_marks_and_spaces(monkeypatch, tmp_path):
    """Byte order marks and spaces around are no matter."""
    path = tmp_path / "settings.json"
    path.write_bytes(b'\xef\xbb\xbf{"budget_tokens": 512}\r\n')
    for value in (f" {path}\n", "\ufeff" + '{"budget_tokens": 512}', ' {"budget_tokens": 512}\n'):
        assert of_environment(monkeypatch, value) == SparseConfig(budget_tokens=512)
    path.write_bytes(b'{"head_budgets": "/tmp/\xe9"}')
    with pytest.raises(ConfigError, match=r"not valid JSON \(no UTF-8 text"):
        of_environment(monkeypatch, str(path))


def test_changed_file_is_read_anew(monkeypatch, tmp_path):
    path = tmp_path / "settings.json"
    for budget in (512, 256):
        path.write_text(json.dumps({"budget_tokens": budget}))
        assert of_environment(monkeypatch, str(path)).budget_tokens == budget


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_fit_32_bits(name):
    assert len(WHOLE) == 10
    for value in (MOST + 1, 10**30, 10**400, 10**5000, -1, -(10**30)):
        with pytest.raises(ConfigError, match=rf"sparse.{name}: .*; allowed: .*{MOST}") as refusal:
            SparseConfig(**{name: value})
        assert len(str(refusal.value)) < 300
    if name not in ("sink_tokens", "window_tokens"):  # a budget must hold these
        config = SparseConfig(**{name: MOST})
        assert config.table_pages(16) <= MOST // 16 + 1
    has_two_defaults = SparseConfig.__dataclass_fields__[name].default is None
    for value in (2.0, True, "1" if has_two_defaults else None, math.nan, "7", [1], {}):
        with pytest.raises(ConfigError, match=rf"sparse.{name}: expected a whole number"):
            SparseConfig(**{name: value})


@pytest.mark.parametrize("name", ["prefill_top_p", "top_p"])
def test_shares_fit_32_bits(name):
    for value in (math.nan, math.inf, -math.inf, 1e-320, 1e-7, -0.1, 1.0001, 10**400):
        with pytest.raises(ConfigError, match=rf"sparse.{name}: .*; allowed: "):
            SparseConfig(**{name: value})
    for value in (1e-6, 0.5, 1, 1.0):
        SparseConfig(**{name: value})


@pytest.mark.parametrize("name, good", [("host_gib", 2**20), ("hot_fraction", 0)])
def test_offload_sizes_are_finite(name, good):
    SparseConfig.from_mapping({"offload": {name: good}}, "test")
    for value in (math.nan, math.inf, 10**400, 10**5000, -1, True, None, "", "Auto", [1], 2**20 + 1):
        with pytest.raises(
            ConfigError, match=rf"sparse.offload.{name}: .*; allowed: auto, or a number"
        ) as refusal:
            SparseConfig.from_mapping({"offload": {name: value}}, "test")
        assert len(str(refusal.value)) < 300


def test_long_values_are_cut():
    """Values of any kind are shown in few characters."""
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "a number of thousands of digits"
    assert shown({"a": 10**5000}) == "a number of thousands of digits"
    assert "nested too deeply" in shown(deep)
    assert len(shown("x" * 10**6)) < 200
    for values in ({"budget_tokens": 10**5000}, {"decode_policy": deep}, {"offload": deep}, {10**5000: 1}, deep):
        with pytest.raises(ConfigError) as refusal:
            SparseConfig.from_mapping(values, "test")
        assert len(str(refusal.value)) < 800


def test_empty_file_names():
    for key in ("head_budgets", "head_patterns"):
        for value in ("", " "):
            with pytest.raises(
                ConfigError, match=f"sparse.{key}: '{value}'; allowed: none, auto, or a file's path"
            ):
                SparseConfig(prefill_policy="vertical_slash", **{key: value})


BUDGETS = {"format": 1, "num_layers": 2, "kv_heads": 2, "shares": [[1, 1], [1, 1]]}
PATTERN = {"vertical_tokens": 16, "slash_tokens": 16, "recent_tokens": 0, "top_p": 0}
PATTERNS = {"format": 1, "num_layers": 2, "q_heads": 2, "candidates": [PATTERN], "patterns": [[0, 0]] * 2}


@pytest.mark.parametrize(
    "share", [0, -1, math.nan, math.inf, 1e308, 1e300, 1e-300, 5e-324, 10**400, True, "1", None]
)
def test_file_shares_are_bounded(share, tmp_path):
    """Shares of files are numbers that budgets can have."""
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps({**BUDGETS, "shares": [[1, 1], [1, share]]}))
    with pytest.raises(TableError, match=r"has the share .*; allowed: numbers above 0, 0.0001 to 10000"):
        budgets.read(path, 2, 2)


def test_largest_budgets_fit_32_bits(tmp_path):
    """The largest shares and budgets are still counts of 32 bits."""
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps({**BUDGETS, "shares": [[1e-4, 1e-4], [1e-4, 1e4]]}))
    config = SparseConfig(budget_tokens=MOST, head_budgets=str(path), dense_layers=0).with_budgets("m", 2, 2)
    pages = [config.head_budget_pages(16, layer, 0, 1, 2) for layer in range(2)]
    assert max(map(max, pages)) == config.largest_pages(16) == MOST // 16 and min(map(min, pages)) >= 5


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vertical_tokens": 2**31}, "up to 2147483647"), ({"recent_tokens": 10**400}, "up to 2147483647"),
        ({"top_p": 1e-320}, "a top_p of 0 to 1, from 1e-06"),
        ({"top_p": 10**400}, "a top_p of 0 to 1"),
        ({"top_p": True}, "a top_p of 0 to 1"), ({"slash_tokens": 1.0}, "tokens from 0 on"),
    ],
)  # fmt: skip
def test_file_patterns_are_bounded(changes, said, tmp_path):
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({**PATTERNS, "candidates": [{**PATTERN, **changes}]}))
    with pytest.raises(TableError, match=said):
        patterns.read(path, 2, 2)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_file_counts_are_whole_numbers(value, tmp_path):
    for table, content, key in ((budgets, BUDGETS, "kv_heads"), (patterns, PATTERNS, "q_heads")):
        path = tmp_path / "table.json"
        for name in ("format", key):
            path.write_text(json.dumps({**content, name: value}))
            with pytest.raises(TableError, match=f"has {name} {value!r}, this needs"):
                table.read(path, 2, 2)

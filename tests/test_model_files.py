"""A file of patterns or budgets is taken for its own model, also copied or renamed, and for no other."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from vllm_sparse import model_files
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode import budgets
from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.prefill import patterns
from vllm_sparse.prefill.patterns import PatternTable

HUB = "/caches/huggingface/hub/models--org--Model-8B/snapshots/1234"
NAMES = (
    ("org/Model-8B", "org/Model-8B", True), ("org/Model-8B", "org/model-8b", True),
    ("org/Model-8B", "other/Model-8B", False), ("org/Model-8B", "org/Model-8B-Instruct", False),
    ("org/Model-8B", "/data/Model-8B", True), ("org/Model-8B", "/data/Model-8B/", True),
    ("org/Model-8B", "/data/Other-8B", False), ("org/Model-8B", HUB, True), (HUB, "org/Model-8B", True),
    ("other/Model-8B", HUB, False), ("/a/Model-8B", "/b/Model-8B", True), ("/a/Model-8B", "/b/Other-8B", False),
    ("/a/Model-8B", "org/Model-8B", True), ("gpt2", "openai-community/gpt2", True), ("gpt2", "gpt3", False),
    ("org/Model-8B", "s3://bucket/Model-8B/", True), ("org/Model-8B", "./Model-8B", True),
)  # fmt: skip


@pytest.mark.parametrize("recorded, served, same", NAMES)
def test_names_of_one_model(recorded, served, same):
    assert model_files.is_same(recorded, None, served) is same
    assert model_files.is_same(recorded, "0" * 32, served) is same, "weights that are not here say nothing"


@pytest.fixture
def models(tmp_path):
    """Two models of one shape, and a copy of the first under another name."""
    for name, byte in (("first", b"a"), ("second", b"b")):
        (tmp_path / name).mkdir()
        # Alike but for one block in the middle, as fine-tunes may be.
        content = b"w" * 300_000 + byte * 30_000 + b"w" * 300_000
        (tmp_path / name / "model.safetensors").write_bytes(content)
    shutil.copytree(tmp_path / "first", tmp_path / "prod")
    return tmp_path


def test_weights_tell_copies(models):
    first, second, prod = (str(models / name) for name in ("first", "second", "prod"))
    weights = model_files.weights_digest(first)
    assert len(weights) == 32 and weights == model_files.weights_digest(prod) != model_files.weights_digest(second)
    assert model_files.is_same(first, weights, prod) is True
    assert model_files.is_same("org/First", weights, prod) is True
    assert model_files.is_same(first, weights, second) is False
    assert model_files.is_same("org/First", weights, second) is False
    assert model_files.is_same(first, None, prod) is False
    assert model_files.is_same("org/First", None, prod) is None, "nobody recorded what could tell"
    (models / "other").mkdir()
    namesake = shutil.copytree(models / "second", models / "other" / "first")
    assert model_files.is_same(first, weights, str(namesake)) is None, "a quantised copy, or another model"
    assert model_files.is_same("org/first", weights, str(namesake)) is None
    (models / "link").symlink_to(models / "first")
    assert model_files.is_same("org/first", None, str(models / "link")) is True
    for nothing in ("", "\x00", "x" * 5000, "/nowhere", "org/nowhere", "a/b/c"):
        assert model_files.weights_digest(nothing) is None
        assert model_files.is_same("org/First", weights, nothing) is False


def settings_with(path, kind: str):
    if kind == "head_budgets":
        return SparseConfig(head_budgets=path).with_budgets
    return SparseConfig(head_patterns=path, prefill_policy="vertical_slash").with_patterns


@pytest.mark.parametrize("kind", ["head_budgets", "head_patterns"])
def test_foreign_files_are_refused(kind, models, monkeypatch):
    """Files of another model are refused with a way to go on."""
    table, content = (
        (budgets, BudgetTable(((1.0, 1.0),) * 3))
        if kind == "head_budgets"
        else (patterns, PatternTable((HeadPattern(16),), ((0, 0),) * 3))
    )
    first, second, prod = (str(models / name) for name in ("first", "second", "prod"))
    path = models / "table.json"

    def served(model: str):
        return getattr(settings_with(str(path), kind)(model, 3, 2), kind)

    table.write(path, content, 2, model=first, weights=model_files.weights_digest(first))
    assert served(first) == served(prod) != "none"
    with pytest.raises(ConfigError) as refusal:
        served(second)
    for words in (f"sparse.{kind}", str(path), repr(first), repr(second), f'write "model": "{second}" into it'):
        assert words in str(refusal.value)
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": second}))  # as the refusal says
    assert served(second) != "none"
    for model in (5, ["m"], True):
        table.write(path, content, 2, model=model)
        with pytest.raises(ConfigError, match=r"has model .*, this needs a name"):
            served(second)
    table.write(path, content, 2)
    assert served(second) != "none", "a file that names no model is the user's own"
    lines = []
    monkeypatch.setattr(logging.getLogger("vllm.vllm_sparse"), "warning", lambda text, *v: lines.append(text % v))
    table.write(path, content, 2, model="org/First")
    assert served(second) != "none"
    assert len(lines) == 1 and "made for org/First" in lines[0] and second in lines[0]


@pytest.mark.parametrize("kind", ["head_budgets", "head_patterns"])
def test_own_file_is_compared_too(kind, models):
    table = budgets if kind == "head_budgets" else patterns
    content = BudgetTable(((1.0, 1.0),) * 3) if kind == "head_budgets" else PatternTable((), (None,) * 3)
    second = models / "second"
    first = str(models / "first")
    place = second / table.FILE_NAME
    table.write(place, content, 2, model=first, weights=model_files.weights_digest(first))
    with pytest.raises(ConfigError, match=f"sparse.{kind}: 'auto': .*was made for the model"):
        settings_with("auto", kind)(str(second), 3, 2)

"""Settings in the wrong place are named with the right one: refused where sparse was asked for, else warned of."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from test_config import refused

from vllm_sparse import misplaced
from vllm_sparse.config import ENV_CONFIG, KEYS, SparseConfig
from vllm_sparse.errors import ConfigError

BUDGET = {"budget_tokens": 512}
RIGHT_KEY = "the key 'sparse'"
# What stands in additional_config, and what the refusal must say.
WRONG = {
    "capital": ({"Sparse": BUDGET}, ["additional_config['Sparse']", RIGHT_KEY]),
    "space": ({"sparse ": BUDGET}, ["additional_config['sparse ']", RIGHT_KEY]),
    "upper": ({"SPARSE": {}}, ["'SPARSE'", RIGHT_KEY]),
    "transposed": ({"spares": BUDGET}, ["'spares'", RIGHT_KEY]),
    "missing letter": ({"spars": BUDGET}, ["'spars'", RIGHT_KEY]),
    "package": ({"vllm-sparse": BUDGET}, ["'vllm-sparse'", RIGHT_KEY]),
    "module": ({"vllm_sparse": "quest"}, ["'vllm_sparse'", RIGHT_KEY]),
    "config": ({"sparse_config": BUDGET}, ["'sparse_config'", RIGHT_KEY]),
    "beside good ones": ({"sparse": BUDGET, "Sparse": {}}, ["'Sparse'", RIGHT_KEY]),
    "top level": (BUDGET, ["additional_config['budget_tokens']", "additional_config['sparse']['budget_tokens']"]),
    "two": ({**BUDGET, "window_tokens": 64}, ["['sparse']['budget_tokens']", "['sparse']['window_tokens']"]),
    "dashes": ({"budget-tokens": 512}, ["'budget-tokens'", "['sparse']['budget_tokens']"]),
    "misspelt": ({"budget_token": 512}, ["'budget_token'", "['sparse']['budget_tokens']"]),
    "path": ({"sparse.budget_tokens": 512}, ["'sparse.budget_tokens'", "['sparse']['budget_tokens']"]),
    "kernel": ({"attention_kernel": "triton"}, ["'attention_kernel'", "['sparse']['attention_kernel']"]),
    "offload": ({"offload": {"host_gib": 4}}, ["'offload'", "['sparse']['offload']"]),
    "of offload": ({"host_gib": 4}, ["'host_gib'", "['sparse']['offload']['host_gib']"]),
    "nested": ({"additional_config": {"sparse": BUDGET}}, ["'additional_config'", RIGHT_KEY]),
    "in a group": ({"attention": BUDGET}, ["additional_config['attention'] holds settings", RIGHT_KEY]),
    "twice": (
        {"sparse": {"sparse": BUDGET}},
        ["unknown key 'sparse'", "stand in additional_config['sparse'] itself"],
    ),
    "offload's beside": (
        {"sparse": {"host_gib": 4}},
        ["unknown key 'host_gib'", '{"offload": {"host_gib": ...}}'],
    ),
    "inside offload": (
        {"sparse": {"offload": {"budget_tokens": 512}}},
        ["unknown key 'budget_tokens' in sparse.offload", "belongs beside 'offload'"],
    ),
}
# Keys that other plugins might have.
OTHERS = (
    {"ascend_scheduler_config": {"enabled": True}}, {"engine": "mine"}, {"offload": True},
    {"offload": {"dir": "/x"}}, {"parser": 1}, {"parse": 1}, {"sparsity": 0.5}, {1: 2},
    {"policy": "fcfs"}, {"sparse_host_gib_admitted": 4.0}, {"window": 1},
    {"cache": {"engine": "x"}}, {"": 1},
)  # fmt: skip


def of_engine(additional) -> SparseConfig:
    return SparseConfig.from_vllm(SimpleNamespace(additional_config=additional))


@pytest.mark.parametrize("case", WRONG)
def test_settings_in_the_wrong_place_are_refused_with_the_right_one(case):
    additional, said = WRONG[case]
    with pytest.raises(ConfigError) as refusal:
        of_engine(additional)
    for words in said:
        assert words in str(refusal.value)


@pytest.mark.parametrize("additional", OTHERS, ids=str)
def test_other_plugins_keep_their_keys(additional):
    assert of_engine(additional) == SparseConfig()
    assert of_engine({**additional, "sparse": BUDGET}) == SparseConfig(**BUDGET)
    assert misplaced.unread(additional, KEYS) == []


def test_additional_configs_of_other_kinds_are_passed_over(monkeypatch):
    monkeypatch.setenv(ENV_CONFIG, json.dumps(BUDGET))
    for additional in (None, {}, SimpleNamespace(compute_hash=lambda: "1")):
        assert of_engine(additional) == SparseConfig(**BUDGET)
        assert misplaced.unread(additional, KEYS) == []


@pytest.mark.parametrize("content", [{"sparse": BUDGET}, {"additional_config": {"sparse": BUDGET}}])
def test_files_and_variables_hold_the_settings_themselves(content, monkeypatch, tmp_path):
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps(content))
    for value, source in ((str(path), "(file sparse.json)"), (json.dumps(content), ENV_CONFIG)):
        monkeypatch.setenv(ENV_CONFIG, value)
        with pytest.raises(ConfigError, match=r'The settings stand in VLLM_.* itself, as in \{"budget') as refusal:
            of_engine({})
        assert source in str(refusal.value)


def test_what_nobody_reads_is_named_and_what_an_engine_carries_is_not():
    assert "additional_config['sparse'] is not read" in misplaced.unread({"sparse": BUDGET}, KEYS)[0]
    assert "additional_config['sparse'] is not read" in misplaced.unread({"sparse": None}, KEYS)[0]
    assert "additional_config['Sparse'] is not read" in misplaced.unread({"Sparse": BUDGET}, KEYS)[0]
    carried = {"sparse": SparseConfig(**BUDGET).to_mapping(), "sparse_host_gib_admitted": 4.0}
    assert misplaced.unread(carried, KEYS) == []


@pytest.mark.engine
def test_an_engine_is_refused_in_our_words_whichever_way_it_is_started(tiny):
    said = "additional_config['budget_tokens'] is not read; allowed: additional_config['sparse']['budget_tokens']"
    assert said in refused(tiny, additional_config=BUDGET)
    for settings, said in (
        ({"sparse": {"budget_tokens": 10**30}}, "sparse.budget_tokens: 1000000000000000000000000000000; allowed"),
        ({"sparse": {"offload": {"host_gib": float("inf")}}}, "sparse.offload.host_gib: inf; allowed"),
        ({"sparse": {"decode_policy": "\ud800"}}, "sparse.decode_policy: unknown value '\\ud800'"),
        ({"sparse": {5: 1}}, "unknown key 5"),
    ):
        assert said in refused(tiny, additional_config=settings)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--model", str(tiny.model()), "--attention-backend", "sparse", "--additional-config"]
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args([*words, json.dumps({"Sparse": BUDGET})]))
    with pytest.raises(ValueError, match=r"additional_config\['Sparse'\] is not read; allowed: the key 'sparse'"):
        arguments.create_engine_config()


@pytest.mark.engine
def test_settings_without_the_backend_are_one_warning_and_stock_answers(tiny, monkeypatch):
    from tiny_engine import prompts, tokens
    from vllm import EngineArgs

    from vllm_sparse.backend import compat

    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    monkeypatch.setenv(ENV_CONFIG, "/nowhere")
    compat.log_once.cache_clear()
    logging.getLogger("vllm.vllm_sparse").addHandler(handler)
    settings = {"sparse": BUDGET, "window_tokens": 64}
    try:
        with tiny.start(backend=None, additional_config=settings) as llm:
            assert len(tokens(llm, prompts((40,)))[0]) == 16
        EngineArgs(str(tiny.model()), additional_config=settings).create_engine_config()
    finally:
        logging.getLogger("vllm.vllm_sparse").removeHandler(handler)
    warnings = [text for level, text in lines if level == "WARNING"]
    assert len(warnings) == 1, lines
    for words in ("--attention-backend sparse was not asked for", "['sparse'] is not read", "['window_tokens']"):
        assert words in warnings[0]
    assert [text for level, text in lines if level == "INFO"] == [
        f"vllm-sparse: {ENV_CONFIG} is not read: --attention-backend sparse was not asked for"
    ]

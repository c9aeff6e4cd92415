"""Budgets of KV heads from a file to the pages attended: what is refused, which rank takes which heads."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
from test_config import refused
from tiny_engine import attention_layers, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode import budgets
from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.errors import ConfigError

LAYERS, KV_HEADS = 3, 2
TABLE = BudgetTable(((0.5, 1.0), None, (1.5, 1.0)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "budgets.json"
    budgets.write(path, TABLE, KV_HEADS, model="some/model")
    return path


def with_file(path, model="some/model", **settings) -> SparseConfig:
    return SparseConfig(head_budgets=str(path), **settings).with_budgets(model, LAYERS, KV_HEADS)


def test_written_table_is_read_back(file):
    """A written table is read back and travels as JSON."""
    assert budgets.read(file, LAYERS, KV_HEADS) == TABLE
    config = with_file(file, dense_layers=0)
    assert config.head_budgets == TABLE, "its mean is 1"
    assert SparseConfig.from_mapping(json.loads(json.dumps(config.to_mapping())), "test") == config
    assert config.with_budgets("some/model", 99, 99) is config, "a worker reads no file"


def test_mean_over_sparse_layers(file):
    """The mean over sparse layers is the budget."""
    assert with_file(file).head_budgets.shares == (None, None, (1.2, 0.8))
    assert BudgetTable(((3.0, 3.0), (3.0, 3.0))).scaled(0).shares == ((1.0, 1.0), (1.0, 1.0))
    assert BudgetTable(((3.0,), None)).scaled(1).shares == (None, None)


def test_budgets_are_whole_pages(file):
    """Budgets are whole pages that hold what is always attended."""
    config = with_file(file, dense_layers=0, budget_tokens=128)
    # Sinks 1 page; a window of 32 can touch 3; one page to choose.
    assert config.head_budget_pages(16, 0, 0, 1, 2) == [5, 8]
    assert config.head_budget_pages(16, 1, 0, 1, 2) == [8, 8], "a layer without shares"
    assert config.head_budget_pages(16, 2, 0, 1, 2) == [12, 8]
    assert config.head_budget_pages(16, 3, 0, 1, 2) == [8, 8], "a draft's layer"
    assert (config.budget_pages(16), config.largest_pages(16)) == (8, 12)
    assert SparseConfig().largest_pages(16) == SparseConfig().budget_pages(16)
    assert SparseConfig(head_budgets=BudgetTable(((0.5,),))).largest_pages(16) == 128
    assert with_file(file, dense_layers=0, min_context_tokens=0).table_pages(16) == 192


def test_ranks_take_their_heads():
    table = BudgetTable(((1.0, 2.0, 3.0, 4.0), (5.0,)))
    assert [table.of_layer(0, rank, 2, 2) for rank in range(2)] == [(1.0, 2.0), (3.0, 4.0)]
    # More ranks than heads: neighbours share one.
    assert [table.of_layer(0, rank, 8, 1)[0] for rank in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert table.of_layer(0, 1, 2, 4) == (1.0, 2.0, 3.0, 4.0), "a layer that is not split"
    assert [table.of_layer(1, rank, 2, 1) for rank in range(2)] == [(5.0,)] * 2
    assert table.of_layer(0, 0, 1, 3) is table.of_layer(2, 0, 1, 4) is None


# Changes to a good file, and what the refusal must say of it.
STALE = {
    "format": ({"format": 2}, "has format 2, this needs 1"),
    "layers": ({"num_layers": 4}, "has num_layers 4, this needs 3"),
    "heads": ({"kv_heads": 8}, "has kv_heads 8, this needs 2"),
    "rows": ({"shares": [[1, 1]] * 2}, "does not have 3 rows of 2 shares"),
    "row": ({"shares": [[1, 1], None, [1]]}, "does not have 3 rows of 2 shares"),
    "no_rows": ({"shares": {"0": [1]}}, "has no list of 'shares'"),
    "zero": ({"shares": [[1, 0], None, [1, 1]]}, "has the share 0; allowed: numbers above 0"),
    "nan": ({"shares": [[1, math.nan], None, [1, 1]]}, "has the share nan"),
    "bool": ({"shares": [[1, True], None, [1, 1]]}, "has the share True"),
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("auto", [False, True], ids=["path", "auto"])
def test_foreign_file_is_refused(file, tmp_path, case, auto):
    """A file of something else is refused with its path and what to do."""
    changes, said = STALE[case]
    path = tmp_path / budgets.FILE_NAME if auto else file
    path.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    value = "auto" if auto else str(file)
    with pytest.raises(ConfigError) as refusal:
        with_file(value, str(tmp_path))
    for words in ("sparse.head_budgets", repr(value), str(path), said, "none", "vllm-sparse tune", "--decode"):
        assert words in str(refusal.value)


def test_auto_takes_the_models_file(file, tmp_path):
    """``auto`` takes the model's file where there is one; ``none`` is the default."""
    assert with_file("auto", str(tmp_path)).head_budgets == "none"
    file.rename(tmp_path / budgets.FILE_NAME)
    assert with_file("auto", str(tmp_path), dense_layers=0).head_budgets == TABLE
    assert SparseConfig().with_budgets(str(tmp_path), 99, 99) == SparseConfig()


def test_dense_decode_reads_no_budgets(caplog, monkeypatch):
    """Dense decode reads no budgets and says so."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", logger="vllm.vllm_sparse"):
        assert with_file("/nowhere", decode_policy="dense").head_budgets == "/nowhere"
    assert "head_budgets is not read" in caplog.text


@pytest.mark.parametrize("given", ["auto", "budgets.json", TABLE], ids=["auto", "path", "table"])
def test_twilight_takes_no_head_budgets(given):
    with pytest.raises(ConfigError, match=r"sparse.head_budgets: .*'twilight'.*top_p.*allowed with it: none"):
        SparseConfig(decode_policy="twilight", head_budgets=given)


def test_workers_need_no_file(file):
    pytest.importorskip("vllm")
    from vllm_sparse.backend import check

    text = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=4)
    model = SimpleNamespace(
        model="some/model", hf_text_config=text, get_total_num_kv_heads=lambda: KV_HEADS
    )  # fmt: skip
    settings = {"head_budgets": str(file), "dense_layers": 0}
    vllm_config = SimpleNamespace(additional_config={"sparse": settings}, model_config=model)
    config = SparseConfig.from_vllm(vllm_config)
    check.carry(vllm_config, config, check.with_tables(vllm_config, config), "head_budgets")
    carried = json.loads(json.dumps(vllm_config.additional_config))
    assert SparseConfig.from_vllm(SimpleNamespace(additional_config=carried)).head_budgets == TABLE


def attended_pages(tiny, model, monkeypatch, **sparse):
    """Answers to two prompts, pages of each KV head by layer in the first step that decodes both, and counts."""
    from vllm_sparse.attention.torch_attn import TorchAttention

    given, attend = [], TorchAttention.attend

    def spy(self, q, kv, table, geometry, *args):
        if len(q) == 2:
            given.append((-(-table.lengths // geometry.page_size)).view(2, -1).tolist())
        return attend(self, q, kv, table, geometry, *args)

    monkeypatch.setattr(TorchAttention, "attend", spy)
    with tiny.start(
        model, {"attention_kernel": "torch", "budget_tokens": 256, **sparse}, enable_prefix_caching=False
    ) as llm:
        answers = tokens(llm, prompts((700, 300)), 8)
        kv_heads = {layer.impl.num_kv_heads for layer in attention_layers(llm).values()}
        counts = metrics.snapshot()
    monkeypatch.setattr(TorchAttention, "attend", attend)
    assert kv_heads == {KV_HEADS}
    return answers, given[:LAYERS], counts


@pytest.mark.seam
@pytest.mark.engine
@pytest.mark.parametrize("offload", [None, {"host_gib": 0.05}], ids=["resident", "offload"])
def test_heads_attend_to_their_budgets(tiny, file, monkeypatch, offload):
    model = tiny.model(num_hidden_layers=LAYERS)
    settings = {"offload": offload, "decode_policy": "quest"}
    uniform, pages, counts = attended_pages(tiny, model, monkeypatch, **settings)
    assert pages == [[[8, 8], [8, 8]]] * LAYERS
    tuned, pages, tuned_counts = attended_pages(tiny, model, monkeypatch, **settings, head_budgets=str(file))
    # Pages of 32: the shorter context has fewer than the largest budget, so all of it is attended.
    assert pages == [[[4, 8], [10, 10]], [[8, 8], [10, 10]], [[12, 8], [10, 10]]]
    assert tuned != uniform
    assert tuned_counts["context_tokens"] == counts["context_tokens"]
    equal = BudgetTable(((0.7, 0.7),) * LAYERS)
    budgets.write(file, equal, KV_HEADS)
    assert attended_pages(tiny, model, monkeypatch, **settings, head_budgets=str(file))[::2] == (uniform, counts)


@pytest.mark.seam
@pytest.mark.engine
def test_engine_takes_the_models_file(tiny):
    """The model's file is taken where it is asked for."""
    model = tiny.model(num_hidden_layers=LAYERS)
    path = model / budgets.FILE_NAME
    budgets.write(path, TABLE, KV_HEADS)
    try:
        with tiny.start(model, {"head_budgets": "auto", "budget_tokens": 256}, block_size=16) as llm:
            selections = [layer.impl.selection for layer in attention_layers(llm).values()]
            assert [s.head_budget_pages.tolist() for s in selections] == [[8, 16], [16, 16], [24, 16]]
        message = refused(tiny, model=model, sparse={"head_budgets": str(model / "config.json")})
        assert "sparse.head_budgets" in message and "config.json has format None" in message
    finally:
        path.unlink()

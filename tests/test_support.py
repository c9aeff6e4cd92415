"""The table of what runs how: every row decides, in its order, and says why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_sparse.backend.connectors import BLOCKS, CONNECTORS
from vllm_sparse.backend.model_config import full_attention_layers, query_heads
from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.offload.config import OffloadConfig
from vllm_sparse.support import (
    FEATURES,
    OPTIONS,
    ROWS,
    Decision,
    Layer,
    Treatment,
    check_options,
    decide,
    notes,
    summary_line,
    unasked,
)
from vllm_sparse.tools import support_page
from vllm_sparse.tools.families import FAMILIES

SPARSE, DENSE, STOCK, REFUSED = Treatment.SPARSE, Treatment.DENSE, Treatment.STOCK, Treatment.REFUSED
OFFLOADED = SparseConfig(offload=OffloadConfig())
PLAIN = Layer(SparseConfig(), position=2, of=32)
CASES = [
    ({"encoder_decoder": True}, STOCK, "encoder-decoder"),
    ({"shares_with": SPARSE, "soft_cap": True}, REFUSED, "in a way of its own"),
    ({"shares_with": SPARSE, "config": OFFLOADED}, REFUSED, "whole context from the host"),
    ({"shares_with": DENSE, "draft": True}, DENSE, "another layer's KV cache"),
    ({"shares_with": STOCK}, STOCK, "another layer's KV cache"),
    ({"draft": True}, STOCK, '{"attention_backend": "sparse"}'),
    ({"kind": "ChunkedLocalAttention"}, STOCK, "class ChunkedLocalAttention"),
    ({"named_backend": "FLASH_ATTN_DIFFKV"}, STOCK, "asks for FLASH_ATTN_DIFFKV"),
    ({"model_type": "flint"}, STOCK, "pages of FlashInfer by itself"),
    ({"attn_type": "encoder_only"}, STOCK, "type encoder_only"),
    ({"sliding_window": 512}, STOCK, "sliding window"),
    ({"non_causal": True}, STOCK, "not causal"),
    ({"image_prefix": True, "drafts": True}, STOCK, "tokens of an image"),
    ({"reference_window": True}, STOCK, "reference sliding-window"),
    ({"alibi": True}, STOCK, "ALiBi"),
    ({"arguments": ("chunk_lookback",)}, STOCK, "chunk_lookback"),
    ({"head_size_v": 64}, STOCK, "128 of K and 64 of V"),
    ({"head_size": 528, "head_size_v": 528}, STOCK, "head size 528"),
    ({"head_size": 24, "head_size_v": 24}, STOCK, "head size 24"),
    ({"dtype": "float64"}, STOCK, "dtype float64"),
    ({"batch_invariant": True}, STOCK, "batch-invariant"),
    ({"prefill_parallel": True}, STOCK, "prefill context parallelism"),
    ({"adaptive_verification": True}, STOCK, "adaptive verification"),
    ({"config": SparseConfig(decode_policy="dense")}, DENSE, "dense policy was asked for"),
    ({"config": SparseConfig(dense_layers=40)}, DENSE, "dense_layers=40 of 32"),
    ({"position": 1}, DENSE, "dense_layers=2"),
]


@pytest.mark.parametrize(("changes", "treatment", "reason"), CASES, ids=lambda value: str(value)[:40])
def test_each_kind_of_layer_is_decided_with_its_reason(changes, treatment, reason):
    decision = decide(replace(PLAIN, **changes))
    assert decision.treatment is treatment
    assert reason in decision.reason and "{" not in decision.reason.replace('{"attention', "")


def unwalked(rows) -> list[str]:
    """Rows of a table that no case takes."""
    taken = {next(row.what for row in rows if row.holds(replace(PLAIN, **changes))) for changes, *_ in CASES}
    return [row.what for row in rows if row.what not in taken]


def test_every_row_is_walked_and_a_plain_layer_is_sparse():
    assert unwalked(ROWS) == [] and len({row.what for row in ROWS}) == len(ROWS)
    assert decide(PLAIN) == Decision(SPARSE)


def test_a_row_without_a_case_is_noticed():
    new = replace(ROWS[0], what="rotary layers", holds=lambda layer: layer.kind == "Rotary")
    assert unwalked((*ROWS, new)) == ["rotary layers"]


@pytest.mark.parametrize("size", [32, 48, 64, 80, 96, 112, 128, 192, 256, 320, 512])
def test_head_sizes_that_kernels_take(size):
    assert decide(replace(PLAIN, head_size=size, head_size_v=size)).treatment is SPARSE


def test_prefixes_of_images_keep_only_drafts_from_being_sparse():
    assert decide(replace(PLAIN, image_prefix=True)).treatment is SPARSE
    assert decide(replace(PLAIN, drafts=True)).treatment is SPARSE


def test_dense_layers_count_full_attention_layers():
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert full_attention_layers(types, 12) == [5, 11]
    assert full_attention_layers(None, 3) == [0, 1, 2]
    assert full_attention_layers(["attention"] * 4, 4) == [0, 1, 2, 3]


def test_query_heads_are_those_of_full_attention_layers():
    """Where sliding windows have others, as in Step 3.5, its config raises for the number of all layers."""
    transformers = pytest.importorskip("transformers")
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    of_layers = {number: {"num_attention_heads": 8} for number in (0, 1)}
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "layer_types": types}
    assert query_heads(transformers.Qwen3Config(**settings)) == 4
    mixed = transformers.Qwen3Config(**settings, per_layer_config=of_layers)
    with pytest.raises(Exception, match="per-layer attribute"):
        mixed.num_attention_heads  # noqa: B018
    assert query_heads(mixed) == 4
    assert query_heads(SimpleNamespace()) == 0


def test_all_dense_layers_need_no_summaries():
    assert decide(replace(PLAIN, config=SparseConfig(dense_layers=32))).all_dense
    assert not decide(replace(PLAIN, position=1)).all_dense


def test_one_line_says_what_happens():
    decisions = [Decision(SPARSE)] * 30 + [Decision(DENSE, "dense_layers=2")] * 2
    line, some = summary_line(decisions, SparseConfig(), ["KV bfloat16"])
    assert some and line == (
        "30 of 32 attention layers sparse (sketch, 2,048 tokens; prefill auto), 2 dense (dense_layers=2: 2); "
        "KV bfloat16"
    )
    line, some = summary_line([Decision(STOCK, "sliding window"), Decision(STOCK, "soft cap")], SparseConfig(), [])
    assert not some and line == "0 of 2 attention layers sparse, 2 stock (sliding window: 1; soft cap: 1)"


def test_layers_that_nobody_asked_about_are_counted_with_a_reason():
    assert "class MLAAttention" in unasked("MLAAttention").reason
    assert unasked("Attention").treatment is STOCK


def test_notes_of_the_start_line():
    assert notes(SparseConfig(), 0, "bfloat16") == ["KV bfloat16"]
    assert notes(OFFLOADED, 3, "float16") == [
        "up to 3 drafts of a request verified sparsely", "K and V in CPU memory", "KV float16",
    ]  # fmt: skip
    assert (
        notes(SparseConfig(decode_policy="dense"), 1, "fp8")[0] == "up to 1 drafts of a request verified densely"
    )


def engine(cache_dtype: str = "auto", scheme: dict | None = None, **changes):
    """What options are read from, of an engine that is served."""
    quantised = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    model = SimpleNamespace(dtype="torch.bfloat16", hf_config=SimpleNamespace(quantization_config=quantised))
    parts = {
        "model_config": model, "cache_config": SimpleNamespace(cache_dtype=cache_dtype, kv_offloading_size=None),
        "parallel_config": SimpleNamespace(), "speculative_config": None, "kv_transfer_config": None,
    }  # fmt: skip
    return SimpleNamespace(**{**parts, **changes})


HYBRID = SimpleNamespace(dtype="bfloat16", is_hybrid=True)
REFUSED_ENGINES = [
    (engine("fp8_e5m2"), r"'fp8_e5m2' is not supported.*allowed: auto, bfloat16, fp8, fp8_e4m3"),
    (engine(scheme={"strategy": "attn_head"}), "'fp8' is not supported.*every KV head.*allowed: bfloat16, given"),
    (engine(parallel_config=SimpleNamespace(decode_context_parallel_size=2)), "2 is not supported.*allowed: 1"),
    (engine(parallel_config=SimpleNamespace(enable_dbo=True)), "micro-batches"),
    (engine(speculative_config=SimpleNamespace(method="eagle")), "'eagle'|with sparse.offload.*ngram, suffix"),
    (
        engine(model_config=HYBRID, speculative_config=SimpleNamespace(method="ngram")),
        "with sparse.offload: drafts were not seen.*: none",
    ),
    (
        engine(model_config=HYBRID, parallel_config=SimpleNamespace(pipeline_parallel_size=2)),
        "with sparse.offload: stages differ.*allowed with offload: 1",
    ),
    (
        engine(cache_config=SimpleNamespace(cache_dtype="auto", mamba_cache_mode="all")),
        "with sparse.offload: every block.*none, align",
    ),
    (engine(model_config=HYBRID, kv_transfer_config=object()), "several pages beside states.*allowed: none"),
    (
        engine(model_config=HYBRID, cache_config=SimpleNamespace(cache_dtype="auto", kv_offloading_size=4.0)),
        "4.0 is not supported.*several pages",
    ),
    (engine(kv_transfer_config=object()), "with sparse.offload: a KV connector"),
    (engine(cache_config=SimpleNamespace(cache_dtype="auto", kv_offloading_size=4.0)), "it is a KV connector"),
    (engine(model_config=SimpleNamespace(dtype="bfloat16", enable_sleep_mode=True)), "hot head pages"),
]
"""One for each of ``OPTIONS``, in their order."""


@pytest.mark.parametrize(
    "dtype",
    [
        "float16", "float32", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "fp8_per_token_head", "int8_per_token_head",
        "int4_per_token_head", "nvfp4", "nvfp4_4over6", "turboquant_k8v4", "ultraquant_4bit",
    ],
)  # fmt: skip
def test_other_caches_are_refused_by_name(dtype):
    with pytest.raises(
        ConfigError, match=f"--kv-cache-dtype: '{dtype}' is not supported.*bfloat16, fp8, fp8_e4m3"
    ):
        check_options(engine(dtype), SparseConfig())


@pytest.mark.parametrize(
    ("option", "case"), list(zip(OPTIONS, REFUSED_ENGINES, strict=True)), ids=lambda value: ""
)
def test_each_option_that_is_not_served_is_refused(option, case):
    vllm_config, said = case
    with pytest.raises(ConfigError, match=f"{option.name}: .*{said}"):
        check_options(vllm_config, OFFLOADED)
    if option.with_offload:
        check_options(vllm_config, SparseConfig())


def test_an_engine_that_is_served_is_not_refused():
    check_options(engine(), OFFLOADED)
    check_options(engine("bfloat16", {"strategy": "attn_head"}), SparseConfig())
    for dtype in ("fp8", "fp8_e4m3"):
        check_options(engine(dtype), OFFLOADED)
        check_options(engine(dtype, {"strategy": "tensor"}), SparseConfig())
    check_options(engine(scheme={"strategy": "tensor"}), SparseConfig())
    assert len(REFUSED_ENGINES) == len(OPTIONS)


def test_every_test_that_the_page_names_exists():
    assert len({feature.what for feature in FEATURES}) == len(FEATURES)
    allowed = [known for known in CONNECTORS.values() if known.copies == BLOCKS]
    assert all(named.tests for named in allowed)
    assert all(feature.tests or feature.on_gpus for feature in FEATURES)
    tests = [test for named in (*FEATURES, *allowed) for test in named.tests]
    for test in (*tests, *(test for feature in FEATURES for test in feature.on_gpus)):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), test


def test_the_support_page_is_what_the_tables_say():
    written = (Path(__file__).parent.parent / support_page.PATH).read_text(encoding="utf-8")
    assert written == support_page.page(), f"run `{support_page.COMMAND}`"
    assert "{" not in written.replace('{"attention_backend": "sparse"}', "")


@pytest.mark.parametrize("test", [test for family in FAMILIES for test in family.tests])
def test_the_tests_of_families_are_there(test):
    """A test that is renamed, or a case that is dropped, leaves no row of the page without its proof."""
    name, case = re.fullmatch(r"(\w+)\[(\w+)\]", test).groups()
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert re.search(rf'"{case}"[:,)\]]', source), f"{name}.py has no case {case}"

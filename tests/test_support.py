"""The table of what runs how: every row decides, in its order, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_sparse.config import SparseConfig
from vllm_sparse.support import ROWS, Decision, Layer, Treatment, decide, full_attention_layers, summary_line

SPARSE, DENSE, STOCK, REFUSED = Treatment.SPARSE, Treatment.DENSE, Treatment.STOCK, Treatment.REFUSED
PLAIN = Layer(SparseConfig(), position=2, of=32)
CASES = [
    ({"linear": True}, STOCK, "linear-attention, Mamba or convolution"),
    ({"encoder_decoder": True}, STOCK, "encoder-decoder"),
    ({"shares_with": SPARSE, "soft_cap": True}, REFUSED, "in a way of its own"),
    ({"shares_with": DENSE, "draft": True}, DENSE, "another layer's KV cache"),
    ({"shares_with": STOCK}, STOCK, "another layer's KV cache"),
    ({"draft": True}, STOCK, '{"attention_backend": "sparse"}'),
    ({"kind": "ChunkedLocalAttention"}, STOCK, "class ChunkedLocalAttention"),
    ({"named_backend": "FLASH_ATTN_DIFFKV"}, STOCK, "asks for FLASH_ATTN_DIFFKV"),
    ({"attn_type": "encoder_only"}, STOCK, "type encoder_only"),
    ({"sliding_window": 512}, STOCK, "sliding window"),
    ({"bidirectional": "tokens of an image"}, STOCK, "tokens of an image"),
    ({"alibi": True}, STOCK, "ALiBi"),
    ({"soft_cap": True}, STOCK, "soft-capped"),
    ({"sinks": True}, STOCK, "sinks"),
    ({"arguments": ("chunk_lookback",)}, STOCK, "chunk_lookback"),
    ({"head_size_v": 64}, STOCK, "128 of K and 64 of V"),
    ({"head_size": 512, "head_size_v": 512}, STOCK, "head size 512"),
    ({"head_size": 24, "head_size_v": 24}, STOCK, "head size 24"),
    ({"dtype": "float64"}, STOCK, "dtype float64"),
    ({"engine": "batch-invariant kernels"}, STOCK, "batch-invariant"),
    ({"config": SparseConfig(decode_policy="dense")}, DENSE, "dense policy was asked for"),
    ({"config": SparseConfig(dense_layers=40)}, DENSE, "dense_layers=40 of 32"),
    ({"position": 1}, DENSE, "dense_layers=2"),
]


@pytest.mark.parametrize(("changes", "treatment", "reason"), CASES, ids=lambda value: str(value)[:40])
def test_each_kind_of_layer_is_decided_with_its_reason(changes, treatment, reason):
    decision = decide(replace(PLAIN, **changes))
    assert decision.treatment is treatment
    assert reason in decision.reason and "{" not in decision.reason.replace('{"attention', "")


def test_every_row_is_walked_and_a_plain_layer_is_sparse():
    decided = {next(row.what for row in ROWS if row.holds(replace(PLAIN, **changes))) for changes, *_ in CASES}
    assert decided == {row.what for row in ROWS}
    assert decide(PLAIN) == Decision(SPARSE)


@pytest.mark.parametrize("size", [32, 48, 64, 80, 96, 112, 128, 192, 256])
def test_head_sizes_that_kernels_take(size):
    assert decide(replace(PLAIN, head_size=size, head_size_v=size)).treatment is SPARSE


def test_dense_layers_count_full_attention_layers():
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert full_attention_layers(types, 12) == [5, 11]
    assert full_attention_layers(None, 3) == [0, 1, 2]
    assert full_attention_layers(["attention"] * 4, 4) == [0, 1, 2, 3]


def test_all_dense_layers_need_no_summaries():
    assert decide(replace(PLAIN, config=SparseConfig(dense_layers=32))).all_dense
    assert not decide(replace(PLAIN, position=1)).all_dense


def test_one_line_says_what_happens():
    decisions = [Decision(SPARSE)] * 30 + [Decision(DENSE, "dense_layers=2")] * 2
    line, some = summary_line(decisions, SparseConfig(), ["KV bfloat16"])
    assert some and line == (
        "30 of 32 attention layers sparse (midbound, 2,048 tokens; prefill dense), 2 dense (dense_layers=2: 2); "
        "KV bfloat16"
    )
    line, some = summary_line([Decision(STOCK, "sliding window"), Decision(STOCK, "soft cap")], SparseConfig(), [])
    assert not some and line == "0 of 2 attention layers sparse, 2 stock (sliding window: 1; soft cap: 1)"

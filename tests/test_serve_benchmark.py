"""The pure parts of ``benchmarks/serve.py``: ranges of lengths, and rows from what ``vllm bench serve`` saved."""

from __future__ import annotations

import argparse
import math

import pytest

pytest.importorskip("tqdm", reason="pip install 'vllm-sparse[demo]'")

from benchmarks import serve

REQUESTS, OUTPUT_TOKENS = 4, 16


def saved(scale: float = 1.0, **changes) -> dict:
    """The JSON of ``vllm bench serve``, as far as it is read; every latency is another number."""
    result = {
        f"p{p}_{name}_ms": scale * (100 * index + p)
        for index, name in enumerate(("ttft", "tpot", "itl"), 1)
        for p in (50, 90, 99)
    }
    totals = {"completed": REQUESTS, "failed": 0, "total_input_tokens": 9000, "duration": 2.0}
    tokens = {"total_output_tokens": REQUESTS * OUTPUT_TOKENS, "output_throughput": 32.0 / scale}
    return result | totals | tokens | changes


def side(scale: float, *starts_s: float) -> dict:
    return serve.read_result(saved(scale), REQUESTS, OUTPUT_TOKENS) | {"starts_s": list(starts_s)}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1024-65536", (1024, 65536)), ("1k-64k", (1024, 65536)), ("512-2k", (512, 2048)), ("8k", (8192, 8192))],
)
def test_token_range(text, tokens):
    assert serve.token_range(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0-8", "64-32", "1-2-3", "1m", "-8", "8-"])
def test_wrong_token_range_is_refused(text):
    """Wrong token range is refused with its value."""
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}; allowed"):
        serve.token_range(text)


def test_centre_and_ratio_give_the_range():
    """Centre and ratio give the range after vLLM rounds outwards."""
    for lowest in (1, 7, 64, 1000, 1024, 8192):
        for span in (0, 2, 448, 1026, 57344, 64512):
            centre, ratio = serve.centre_and_ratio(lowest, lowest + span)
            assert 0 <= ratio < 1
            assert math.floor(centre * (1 - ratio)) == lowest
            assert math.ceil(centre * (1 + ratio)) == lowest + span


def test_arguments_for_servers():
    """Arguments after two dashes go to the servers."""
    args = serve.parse_args(["--requests", "3", "--", "--dtype", "float32"])
    assert (args.requests, args.input_tokens, args.server) == (3, (1024, 65536), ["--dtype", "float32"])
    stock, sparse = (serve.server_arguments(args, backend) for backend in ("FLASH_ATTN", "sparse"))
    assert stock[-2:] == sparse[-2:] == ["--dtype", "float32"]
    assert "--attention-backend=sparse" in sparse
    assert [word for word in sparse if word not in stock][1:] == ['--additional-config={"sparse": {}}']


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--requests", "0"], ["--starts", "1.5"]])
def test_wrong_argument_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        serve.parse_args(arguments)
    assert f"{arguments[0]}: " in capsys.readouterr().err


def test_rows_hold_both_sides():
    """Rows hold both sides, and a speedup above 1 where sparse is better."""
    rows = {row["bench"]: row for row in serve.make_rows({"gpu": "x"}, side(2.0, 50, 30), side(1.0, 40, 20, 25))}
    assert len(rows) == 12
    assert all(row["speedup"] == 2.0 for name, row in rows.items() if "start" not in name)
    for index, name in enumerate(("ttft", "tpot", "itl"), 1):
        for p in (50, 90, 99):
            row = rows[f"serve_{name}_p{p}"]
            assert (row["baseline_ms"], row["sparse_ms"]) == (2 * (100 * index + p), 100 * index + p)
    throughput = rows["serve_throughput"]
    assert (throughput["baseline_tokens_per_s"], throughput["sparse_tokens_per_s"]) == (16.0, 32.0)
    cold, warm = rows["serve_start_cold"], rows["serve_start_warm"]
    assert (cold["baseline_s"], cold["sparse_s"], cold["overhead_s"], cold["speedup"]) == (50, 40, -10, 1.25)
    assert (warm["baseline_s"], warm["sparse_s"], warm["overhead_s"], warm["speedup"]) == (30, 20, -10, 1.5)
    assert all(row["gpu"] == "x" for row in rows.values())


def test_rows_without_a_baseline():
    rows = serve.make_rows({}, None, side(1.0, 40))
    assert len(rows) == 11, "no warm start"
    assert all(row["speedup"] is None for row in rows)
    assert next(row for row in rows if row["bench"] == "serve_tpot_p50")["sparse_ms"] == 250


@pytest.mark.parametrize("changes", [{"completed": REQUESTS - 1}, {"total_output_tokens": 63}])
def test_incomplete_result_is_refused(changes):
    """Result of fewer requests or tokens is refused."""
    with pytest.raises(serve.BenchmarkError, match="of 4 requests completed"):
        serve.read_result(saved(**changes), REQUESTS, OUTPUT_TOKENS)


def test_random_text_round_trip(tmp_path):
    """A text of random tokens comes back as the same tokens."""
    transformers = pytest.importorskip("transformers")
    folder = serve.write_model(tmp_path, {"vocab_size": 300, "eos_token_id": 2})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = [299, 0, 17, 17, 150]
    assert (tokenizer.vocab_size, tokenizer.all_special_ids) == (300, [2])
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens

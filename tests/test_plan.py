"""`vllm-sparse plan` says what the engine then reports."""

from __future__ import annotations

import json
import re

import pytest
import test_hybrids
from tiny_engine import ENGINE, SPARSE, attention_layers, engine_core

from vllm_sparse.tools import cli
from vllm_sparse.tools.dry_engine import OVERHEAD_GIB
from vllm_sparse.tools.plan import tokens

HOST_GIB = 0.05


def plan(capsys, *arguments) -> str:
    assert cli.main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def tokens_of(printed: str, mode: str) -> int:
    return int(re.search(rf"^{mode} +([\d,]+) tokens", printed, re.MULTILINE)[1].replace(",", ""))


@pytest.mark.seam
@pytest.mark.engine
@pytest.mark.parametrize(
    "kv_mib, kv_cache_dtype",
    [(32, "auto"), (3, "auto"), (3, "fp8")],
    ids=["host_is_narrower", "gpu_is_narrower", "fp8"],
)
def test_plan_is_what_the_engine_reports(tiny, capfd, kv_mib, kv_cache_dtype):
    # capfd, for vLLM asks standard output for its file descriptor.
    printed = plan(
        # CPUs capture no CUDA graphs, for which a plan counts batches of twice that size.
        capfd, tiny.model(), "--gpu", 1, "--kv-gib", kv_mib / 1024, "--host", HOST_GIB, "--context", 1024,
        "--max-num-seqs", ENGINE["max_num_seqs"] // 2, "--max-num-batched-tokens",
        ENGINE["max_num_batched_tokens"], "--dtype", "float32", "--sparse", json.dumps(SPARSE),
        "--kv-cache-dtype", kv_cache_dtype,
    )  # fmt: skip
    settings = {"block_size": 16, "kv_cache_memory_bytes": kv_mib << 20, "kv_cache_dtype": kv_cache_dtype}
    modes = {
        "stock": {"backend": "CPU_ATTN"},
        "sparse, resident": {},
        "sparse, offload": {"sparse": {"offload": {"host_gib": HOST_GIB}}},
    }
    if kv_cache_dtype == "fp8":
        del modes["stock"]  # which takes it on some CPUs only
    reported = {}
    for mode, changes in modes.items():
        # The CPU's own backend takes blocks of 32 tokens at least.
        blocks = {"block_size": 32} if mode == "stock" else {}
        with tiny.start(**{**settings, **changes, **blocks}) as llm:
            cache = engine_core(llm).vllm_config.cache_config
            reported[mode] = cache.num_gpu_blocks * cache.block_size
    planned = {mode: tokens_of(printed, mode) for mode in modes}
    stock = tokens_of(printed, "stock") // 32 * 32
    if "stock" in planned:
        planned["stock"] = stock
    assert planned == reported
    assert reported["sparse, offload"] > stock > reported["sparse, resident"]
    assert ("the GPU cannot index more" in printed) == (kv_mib == 3)


def test_llama_8b_by_hand(tmp_path, capsys):
    from benchmarks.shapes import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    printed = plan(capsys, tmp_path, "--gpu", 80, "--host", 128, "--context", "128k", "--max-num-seqs", 8)
    # 8,030,261,248 parameters of 2 bytes; K and V of a token take 32 layers * 8 heads * 512 bytes.
    assert "weights              14.96 GiB, 32 layers, 8 KV heads" in printed
    for_kv = 80 * 0.9 - 8030261248 * 2 / 2**30 - OVERHEAD_GIB
    assert f"{for_kv:.2f} GiB of each of 1 GPU" in printed
    assert tokens_of(printed, "stock") == int(for_kv * 2**30) // (16 * 131072) * 16
    assert tokens_of(printed, "sparse, offload") == 1 << 20
    assert "sparse, offload         1,048,576 tokens: 8 contexts of 131,072" in printed
    two = plan(capsys, tmp_path, "--gpu", 80, "--host", 128, "--tensor-parallel-size", 2, "--max-num-seqs", 8)
    assert tokens_of(two, "sparse, offload") == 1 << 20
    assert tokens_of(two, "stock") > 2 * tokens_of(printed, "stock")


def test_cache_of_fp8_by_hand(tmp_path, capsys):
    """A cache in fp8 holds twice the tokens, and a host pool takes half the bytes, with any ``host_dtype``."""
    from benchmarks.shapes import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    arguments = [tmp_path, "--gpu", 80, "--host", 64, "--kv-gib", 40, "--max-num-seqs", 8]
    wide, coded, twice = (
        plan(capsys, *arguments, *more)
        for more in (
            (),
            ("--kv-cache-dtype", "fp8"),
            ("--kv-cache-dtype", "fp8_e4m3", "--host-dtype", "fp8"),
        )
    )
    assert coded == twice and "hold K and V in fp8" in coded
    # A token takes 131,072 bytes in 16 bits, and a sketch one slot of 16 bits per channel or two of 8.
    assert tokens_of(wide, "stock") == 40 << 13 == tokens_of(coded, "stock") // 2
    assert tokens_of(wide, "sparse, resident") == (40 << 30) // (17 * 131072) * 16
    assert tokens_of(coded, "sparse, resident") == (40 << 30) // (18 * 65536) * 16
    assert tokens_of(wide, "sparse, offload") == 64 << 13 == tokens_of(coded, "sparse, offload") // 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gpu", "8", "--host", "64"], "--gpu: of 8 GiB, 7.20 may be used, and the weights take 14.96"),
        (["--gpu", "80", "--host", "64", "--block-size", "24"], "--block-size: 24"),
        (["--gpu", "80", "--host", "64", "--tensor-parallel-size", "3"], "--tensor-parallel-size: 3"),
        (["--gpu", "80", "--host", "64", "--sparse", '{"budget": 3}'], "unknown key 'budget'"),
        (["--gpu", "80", "--host", "64", "--sparse", "{"], "--sparse: not valid JSON"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, capsys, arguments, said):
    from benchmarks.shapes import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert cli.main(["plan", str(tmp_path), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "nothing"), "--gpu", "80", "--host", "1"]) == 1


def test_host_too_small_is_said(tmp_path, capsys):
    """A host too small for one context is said."""
    from benchmarks.shapes import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    printed = plan(capsys, tmp_path, "--gpu", 80, "--host", 8, "--context", "128k")
    assert tokens_of(printed, "sparse, offload") == 0
    assert "offload does not start" in printed and "16.002 GiB of host memory" in printed


@pytest.mark.seam
@pytest.mark.engine
@pytest.mark.skipif(test_hybrids.TOO_OLD, reason="vLLM 0.31 has no kernels for states in float32 on a CPU")
def test_blocks_beside_states_are_planned(tiny, capfd):
    model, options = test_hybrids.model_of(tiny, "granite4")
    printed = plan(
        capfd, model, "--gpu", 1, "--kv-gib", 32 / 1024, "--host", 0.2, "--context", 1024, "--max-num-seqs",
        ENGINE["max_num_seqs"] // 2, "--max-num-batched-tokens", ENGINE["max_num_batched_tokens"], "--dtype",
        "float32", "--sparse", json.dumps(SPARSE),
    )  # fmt: skip
    options["enable_prefix_caching"] = True  # as is the default
    with tiny.start(model, {"offload": {"host_gib": 0.2}}, block_size=16, **options) as llm:
        cache = engine_core(llm).vllm_config.cache_config
        (layer, *_) = attention_layers(llm).values()
        shape, reported = layer.impl.pages.offloaded.store.shape, cache.num_gpu_blocks
    assert tokens_of(printed, "sparse, offload") == reported * 1024 // shape.context_blocks(1024)
    states = shape.states.request_blocks
    assert f"{shape.block_tokens} tokens; in each context {states} more are held by states" in printed
    assert tokens_of(printed, "stock") > 0 and "summaries and states" in printed


def test_token_notation():
    assert (tokens("131072"), tokens("128k"), tokens("1m")) == (131072, 131072, 1 << 20)

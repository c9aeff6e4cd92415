"""Offload with the host pool in fp8: what it costs in accuracy, and that nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from cases import DEVICE
from test_offload_engine import (
    BATCH,
    LITTLE_GPU,
    MIXED,
    PAGE_BYTES,
    PREEMPTION,
    SPARSE_PREFILL,
    assert_idle,
    assert_store,
    offloaded,
)  # fmt: skip
from tiny_engine import cached_tokens, engine_core, outputs, preemptions, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.kernels import reference
from vllm_sparse.kernels.reference.e4m3 import from_e4m3, kept, to_e4m3
from vllm_sparse.offload.config import OffloadConfig
from vllm_sparse.offload.sizing import CacheShape
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.tools import cli

FP8 = {"host_gib": 0.02, "host_dtype": "fp8"}
HEAD_PAGE_BYTES = 16 * 2 * 32
MOST = 448.0
"""The largest code of e4m3."""


def steps_of(exponents: torch.Tensor) -> torch.Tensor:
    """``2^exponent`` [..., 1, 1] of the halves of a head page, side by side [..., 2, 1, 1]."""
    return (2.0 ** (exponents.double() - 127))[..., None, None]


def halves(kv: torch.Tensor) -> torch.Tensor:
    """[..., rows, 2 * head_dim] as K and V: [..., 2, rows, head_dim]."""
    return kv.double().unflatten(-1, (2, -1)).transpose(-2, -3)


def head_pages(
    seed: int = 0, count: int = 200, rows: int = 16, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Head pages of very different sizes, some with a value far above the rest."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(count, rows, 32, generator=generator)
    kv *= 2.0 ** torch.randint(-14, 14, (count, 1, 1), generator=generator)
    kv[::5, 3, 7] *= 2000
    return kv.clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_coding_error_bound(dtype):
    kv = head_pages(dtype=dtype)
    codes, exponents = to_e4m3(kv)
    back = from_e4m3(codes, exponents, dtype)
    x, y, step = halves(kv), halves(back), steps_of(exponents)
    assert ((x - y).abs() <= torch.maximum(x.abs() * 2**-4, step * 2**-10)).all()
    largest = x.abs().amax((-1, -2), keepdim=True)
    assert (largest <= MOST * step).all() and (largest > MOST / 2 * step).all()
    # What came back is stored as it is, and so is what fits a larger exponent.
    again = from_e4m3(*to_e4m3(back), dtype)
    assert torch.equal(again, back)


def test_a_page_that_grows_ends_as_one_that_came_whole_up_to_the_least_step():
    """Token by token, each time staged, added to and written again; the largest values come last."""
    kv = head_pages(3) * 2.0 ** (torch.arange(16)[:, None] // 3)
    growing = kv[:, :0]
    for row in range(16):
        growing = from_e4m3(*to_e4m3(torch.cat([growing, kv[:, row : row + 1]], 1)), torch.float32)
    codes, exponents = to_e4m3(kv)
    whole, step = halves(from_e4m3(codes, exponents, torch.float32)), steps_of(exponents)
    x, y = halves(kv), halves(growing)
    assert ((x - y).abs() <= x.abs() * 2**-4 + step * 2**-9).all()
    normal = x.abs() >= 2**-6 * step
    assert normal.sum() > 0.9 * normal.numel() and torch.equal(y[normal], whole[normal])


def write(kv: torch.Tensor, run) -> tuple[torch.Tensor, torch.Tensor]:
    """One page [rows, 2 * head_dim] through ``write_through``: codes and exponents."""
    from offload_cases import make_store, tail_slots

    store = make_store(4, 1, kv.shape[1] // 2, len(kv), fp8=True)
    slots = torch.cat([tail_slots([2], [row], len(kv)) for row in range(len(kv))])
    run.plan_writes(slots, len(kv), store.plan)
    store.hot[0, 0, : len(kv)] = kv.to(DEVICE)
    store.host.view(torch.uint8).fill_(0x55)
    run.write_through(store.hot, store.plan, len(kv), store.host, store.summaries, store.hot_set, store.exponents)
    return store.host[2, 0].view(torch.uint8), store.exponents[2, 0]


EXTREMES = {
    "zeros": [0.0, -0.0],
    "largest_code": [448.0, -448.0, 1.0, 2**-9, 2**-10, 3 * 2**-10, 2**-6, 0.9 * 2**-6, -(2**-9)],
    "above_it": [448.0001, 1.0625, 1.1875, 1.3125, 464.0, 17.0, 19.0, 2**-7 * 1.5],
    "tiny": [1e-38, -3e-39, 1e-42, 1.5e-38],
    "huge": [3.4e38, -3.3e38, 1e36, 1e30, 1.0],
    "not_finite": [float("nan"), float("inf"), float("-inf"), 1.0, -0.3, 0.01],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_coded_as_by_the_reference(name):
    pytest.importorskip("triton")
    from vllm_sparse.kernels import launchers

    kv = torch.zeros(16, 64)
    kv.view(-1)[: 2 * len(EXTREMES[name]) : 2] = torch.tensor(EXTREMES[name])
    kv[:, 32:] = 3 * kv[:, :32].flip(0)
    ours, theirs = write(kv, launchers), write(kv, reference)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0], theirs[0])
    back = kept(ours[0].view(torch.float8_e4m3fn), ours[1], ..., torch.float32)
    assert torch.equal(back.isnan().cpu(), ~kv.isfinite()) and not back.isinf().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_code_is_read_as_torch_reads_it(dtype):
    """At exponents that the dtype reaches, and some beyond, where large codes are infinite."""
    pytest.importorskip("triton")
    from vllm_sparse.kernels import launchers

    stored = torch.tensor([1, 8, 100, 119, 127, 135, 136] + [200, 246] * (dtype == torch.float32), device=DEVICE)
    codes = torch.arange(256, device=DEVICE).to(torch.uint8).view(1, 1, 16, 16).repeat(len(stored), 1, 1, 1)
    exponents = torch.stack([stored, stored], -1).to(torch.uint8)[:, None]
    blocks = torch.arange(len(stored), dtype=torch.int32, device=DEVICE)
    out = torch.full(codes.shape, 7.0, dtype=dtype, device=DEVICE)
    host = codes.view(torch.float8_e4m3fn)
    launchers.read_pages(host, blocks, out, blocks, 3, exponents)
    expected = (
        codes.view(torch.float8_e4m3fn).double() * 2.0 ** (stored.double() - 127)[:, None, None, None]
    ).cpu()
    torch.testing.assert_close(out.cpu(), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_attention_over_coded_pages_is_close():
    generator = torch.Generator().manual_seed(5)
    kv = torch.randn(24, 2, 16, 128, generator=generator)
    codes, exponents = to_e4m3(kv)
    coded = from_e4m3(codes, exponents, torch.float32)
    q = torch.randn(2, 6, 64, generator=generator)
    lengths = torch.tensor([180, 200], dtype=torch.int32)
    geometry, answers = Geometry(6, 2, 64, 16, 0.125), []
    for pages in (kv, coded):
        out = torch.full_like(q, float("nan"))
        reference.dense_attention(
            q, pages, torch.arange(24).view(2, 12), torch.tensor([0, 1, 2]), lengths, geometry, out
        )
        answers.append(out)
    exact, found = answers
    assert 0 < (exact - found).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("value", ["fp16", "FP8", 8, None])
def test_other_dtypes_are_refused(value):
    from vllm_sparse.config import KEYS
    from vllm_sparse.errors import ConfigError

    with pytest.raises(ConfigError) as refusal:
        OffloadConfig.from_mapping({"host_dtype": value}, "test", KEYS)
    assert f"sparse.offload.host_dtype: {value!r}; allowed: auto, fp8" in str(refusal.value)


def test_fp8_pool_sizes():
    plain, coded = (CacheShape(32, 8, 128, 16, 2, 1, dtype) for dtype in ("auto", "fp8"))
    assert plain.host_block_bytes == 2 * coded.host_block_bytes
    assert coded.map_block_bytes - plain.map_block_bytes == 2 * 32 * 8
    assert (plain.slot_bytes, plain.head_page_bytes) == (coded.slot_bytes, coded.head_page_bytes)


def planned(capsys, folder, *options) -> int:
    arguments = ["plan", str(folder), "--gpu", "80", "--host", "64", "--context", "128k", "--max-num-seqs", "8"]
    assert cli.main([*arguments, *options]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sparse, offload"))
    return int(line.split()[2].replace(",", ""))


def test_the_planner_counts_twice_the_tokens(tmp_path, capsys):
    from benchmarks.shapes import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    plain, coded = planned(capsys, tmp_path), planned(capsys, tmp_path, "--host-dtype", "fp8")
    assert coded == 2 * plain
    setting = ("--sparse", '{"offload": {"host_dtype": "fp8"}}')
    assert planned(capsys, tmp_path, *setting) == coded
    assert planned(capsys, tmp_path, *setting, "--host-dtype", "auto") == plain
    assert planned(capsys, tmp_path, "--sparse", '{"offload": null}', "--host-dtype", "fp8") == coded
    refused = ["plan", str(tmp_path), "--gpu", "80", "--host", "64", "--sparse"]
    assert cli.main([*refused, '{"offload": null, "decode_policy": "oracle"}']) == 1
    assert "sparse.decode_policy: 'oracle'" in capsys.readouterr().err


def answer(tiny, batch=MIXED, max_tokens=24, **settings) -> list[list[int]]:
    with tiny.start(**settings) as llm:
        return tokens(llm, batch, max_tokens)


@pytest.mark.engine
@pytest.mark.parametrize("hot", ["auto", 0.02, 0])
def test_tokens_are_those_of_resident_mode_where_codes_are_exact(tiny, codable, hot):
    expected = answer(tiny, block_size=16)
    assert expected != tiny.stock(MIXED, 24), "rounding K and V changed nothing"
    with tiny.start(sparse={"offload": {**FP8, "hot_fraction": hot}}, block_size=16) as llm:
        assert tokens(llm, MIXED, 24) == expected
        counts = metrics.snapshot()
        assert_store(llm)
        assert_idle(llm)
    assert counts["head_page_bytes"] == HEAD_PAGE_BYTES
    assert (counts["head_pages_in_place"] == counts["head_pages_looked_up"] > 0) == (hot == 0)


@pytest.mark.engine
@pytest.mark.parametrize("policy", ["a_shape", "vertical_slash"])
def test_sparse_prefill_reads_what_was_written(tiny, codable, policy):
    sparse = {**SPARSE_PREFILL, "prefill_policy": policy}
    expected = answer(tiny, sparse=sparse, block_size=16)
    assert answer(tiny, sparse={**sparse, "offload": FP8}, block_size=16) == expected


@pytest.mark.seam
@pytest.mark.engine
def test_a_cached_prefix_is_read_as_it_was_written(tiny, codable):
    first, others = prompts((700,), seed=7), prompts((700, 690, 680), seed=8)
    expected = answer(tiny, first)
    with tiny.start(sparse={"offload": FP8}, **LITTLE_GPU) as llm:
        assert tokens(llm, first, 24) == expected
        tokens(llm, others, 24)
        results = outputs(llm, first, 24)
        assert_store(llm)
    assert [list(result.outputs[0].token_ids) for result in results] == expected
    assert cached_tokens(results) == [672]


@pytest.mark.engine
@pytest.mark.parametrize("caching", [True, False], ids=["prefix_cache", "no_prefix_cache"])
def test_requests_preempted_from_a_small_pool_give_the_same_tokens(tiny, codable, caching):
    settings = {"enable_prefix_caching": caching, **PREEMPTION}
    expected = answer(tiny, BATCH, 90, sparse={"budget_tokens": 2048}, **settings)
    offload = {**FP8, "host_gib": 32.5 * PAGE_BYTES / 4 / 2**30}
    with preemptions() as seen, tiny.start(sparse={"budget_tokens": 2048, "offload": offload}, **settings) as llm:
        assert offloaded(llm)[0].host.shape[0] == 32
        assert tokens(llm, BATCH, 90) == expected
        assert_store(llm)
        assert_idle(llm)
    assert any(done for _, done in seen), "no request was preempted while it was decoding"


@pytest.mark.engine
def test_rows_that_cannot_be_scored_attend_to_whole_contexts_in_place(tiny, codable, monkeypatch):
    """More and longer contexts than the score buffer holds, read in several pieces."""
    from vllm_sparse.backend import workspace
    from vllm_sparse.offload import store

    monkeypatch.setattr(workspace, "SCORE_BYTES", 0)
    monkeypatch.setattr(store, "MOST_IN_PLACE", 5 * 2 * 17)
    whole, attend = [], store.OffloadedLayer.attend_whole

    def watched(self, attention, query, block_table, plan, *rest):
        whole.append(int((plan.dense_seq_lens > 0).sum()))
        attend(self, attention, query, block_table, plan, *rest)

    monkeypatch.setattr(store.OffloadedLayer, "attend_whole", watched)
    batch = prompts((230,) * 22, seed=6)
    settings = {"max_model_len": 256, "block_size": 16, "max_num_seqs": 22, "max_num_batched_tokens": 1024}
    expected = answer(tiny, batch, 18, **settings)
    assert answer(tiny, batch, 18, sparse={"offload": FP8}, **settings) == expected
    assert max(whole) > 1


@pytest.mark.engine
def test_codes_are_read_alike_everywhere(tiny):
    """In a model as it is, whose values codes do not hold exactly."""
    found = answer(tiny, block_size=16, sparse={"offload": FP8})
    assert found != answer(tiny, block_size=16), "nothing was coded"
    assert answer(tiny, block_size=16, sparse={"offload": {**FP8, "hot_fraction": 0}}) == found


@pytest.mark.engine
def test_capacity_is_four_times_that_of_float32(tiny):
    with tiny.start(sparse={"offload": FP8}, block_size=16) as llm:
        blocks = engine_core(llm).vllm_config.cache_config.num_gpu_blocks
        store = offloaded(llm)[0].store
    assert blocks == 4 * int(FP8["host_gib"] * 2**30) // PAGE_BYTES == store.num_pages
    assert store.pool.num_bytes == blocks * PAGE_BYTES // 4

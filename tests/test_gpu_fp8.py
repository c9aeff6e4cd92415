"""A KV cache of e4m3 on a GPU: beside stock's own backends over one, with graphs, sparse prefill, offload."""

from __future__ import annotations

import pytest
import torch
from cases import ON_GPU, error, make
from test_fp8_kernels import SCALES
from test_gpu_engine import GRAPHS, SPARSE, answer  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

FP8 = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "forced": True}
EVERYTHING = {**SPARSE, "budget_tokens": 4096}
PREFILL = {"prefill_policy": "vertical_slash", "min_prefill_tokens": 256, "prefill_top_p": 0}
FA3_TOLERANCE = 0.06
"""Its queries are in e4m3, too: half a step of theirs is 1/16 of a number at most."""


def likelihoods(found) -> torch.Tensor:
    """Log-probabilities of the tokens that every engine was made to go on with."""
    steps = [step for output in found for step in zip(output.token_ids, output.logprobs, strict=True)]
    return torch.tensor([likely[token].logprob for token, likely in steps])


def distance(a, b) -> float:
    return (likelihoods(a) - likelihoods(b)).abs().mean().item()


def test_a_budget_of_the_context_is_as_near_stock_as_stock_is_to_itself(answer):  # noqa: F811
    flash, triton = (answer(None, attention_backend=f"{name}_ATTN", **FP8) for name in ("FLASH", "TRITON"))
    sizes = {**PREFILL, "vertical_tokens": 4096, "slash_tokens": 4096}
    noise = distance(flash, triton)
    for sparse, settings in (
        (EVERYTHING, {}),
        (EVERYTHING, {"compilation_config": GRAPHS}),
        ({**EVERYTHING, **sizes}, {}),
    ):
        found = answer(sparse, **settings, **FP8)
        assert min(distance(found, flash), distance(found, triton)) < 1.5 * noise + 1e-3, (
            f"{distance(found, flash)} and {distance(found, triton)} from stock, whose backends are {noise} apart"
        )


@pytest.mark.parametrize("policy", ["midbound", "sketch"])
def test_few_pages_are_attended(answer, policy):  # noqa: F811
    """In graphs, with sparse prefill, and without a wait for the device."""
    sparse = {**SPARSE, "decode_policy": policy, **PREFILL, "vertical_tokens": 128, "slash_tokens": 256}
    found = answer(sparse, compilation_config=GRAPHS, **FP8)
    assert found.counts["attended_tokens"] < 0.7 * found.counts["context_tokens"]
    assert not found.waits, found.waits[:3]


def test_offload_holds_the_same_codes(answer):  # noqa: F811
    resident = {"budget_tokens": 512, "min_context_tokens": 1024, "dense_layers": 0}
    offload = {**resident, "dense_layers": None, "offload": {"host_gib": 0.5, "hot_fraction": 0.01}}
    found = answer(offload, compilation_config=GRAPHS, **FP8)
    assert found.counts["head_page_bytes"] == 16 * 2 * 64
    assert distance(found, answer(resident, compilation_config=GRAPHS, **FP8)) < 0.02


def test_layers_that_are_left_out(answer):  # noqa: F811
    """Beside stock's Triton backend: its FlashAttention takes scheduling data of the other dtype, and stops."""
    left_out = {"kv_cache_dtype_skip_layers": ("1",), **FP8}
    found = answer(EVERYTHING, compilation_config=GRAPHS, **left_out)
    assert found.counts["sparse_layers"] == 3
    stock = answer(None, attention_backend="TRITON_ATTN", **left_out)
    assert distance(found, stock) < distance(found, answer(EVERYTHING, compilation_config=GRAPHS, **FP8))


@pytest.mark.parametrize("shape", [(2, 3, 64, 16), (8, 4, 128, 16), (1, 7, 256, 64)])
def test_fa3_reads_codes(shape):
    from vllm_sparse.attention.fa3_attn import FA3Attention
    from vllm_sparse.kernels import launchers, reference

    coded = {"kv_dtype": torch.float8_e4m3fn, "kv_scales": SCALES}
    case = make([389, 0, 77], *shape, 4, dtype=torch.bfloat16, **coded)
    reference.page_mass(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    reference.select_pages(case.scores, case.block_table, case.plan, case.kv, case.selection(), case.table)
    found, expected = torch.full_like(case.q, 7.0), torch.full_like(case.q, 7.0)
    FA3Attention().attend(case.q, case.kv, case.table, case.geometry, found)
    launchers.sparse_decode(case.q, case.kv, case.table, case.geometry, expected)
    assert (found[1] == 7.0).all(), "a row that is not this kernel's was written"
    assert error(found[[0, 2]], expected[[0, 2]]) < FA3_TOLERANCE

"""Models that take images: prompts with real ones, and image tokens that attend to later ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import tiny_images
import vllm
from test_families import EVERYTHING, FEW, answers, assert_same
from tiny_engine import prompts

from vllm_sparse.backend import dense, prefill_rows
from vllm_sparse.backend.metadata import SparseMetadata, Step
from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.decode_plan import EXACT
from vllm_sparse.prefill.runs import PrefillRun

IMAGES = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
LAYERS = {"qwen2_5_vl": (3, 0), "qwen3_vl": (3, 0), "qwen3_5": (1, 0), "gemma3": (1, 2)}
"""Sparse and stock ones."""
OPTIONS = {"qwen3_5": {"enable_prefix_caching": False, "dtype": "bfloat16"}}
# Stock vLLM 0.33 on the compiled modules of 0.32 gives no numbers for the other one.
CASES = [pytest.param(case, marks=() if case in OPTIONS else pytest.mark.seam) for case in tiny_images.MODELS]


@pytest.mark.engine
@pytest.mark.skipif(vllm.__version_tuple__ < (0, 32), reason="seen on vLLM 0.32 and later")
@pytest.mark.parametrize("case", CASES)
def test_a_model_answers_about_an_image_as_stock_does(tiny, case):
    path = tiny_images.make(tiny.root / case, case)
    texts, options = prompts((5, 300)), {**IMAGES, **OPTIONS.get(case, {})}
    noise = 0.1 if "dtype" in options else 0.0
    batch = [tiny_images.prompt(case, text, seed) for seed, text in enumerate(texts)]
    others = [tiny_images.prompt(case, text, seed + 2) for seed, text in enumerate(texts)]
    with tiny.start(path, backend="CPU_ATTN", **options) as llm:
        expected = answers(llm, batch)
        assert answers(llm, others) != expected, "this model does not see images"
    with tiny.start(path, EVERYTHING, **options) as llm:
        assert_same(answers(llm, batch), expected, noise)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert (counts["sparse_layers"], sum(counts["stock_layers"].values())) == LAYERS[case]
    with tiny.start(path, FEW, **options) as llm:
        found = answers(llm, batch)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert_same(found[:1], expected[:1], noise)  # a context within the budget
    assert all(math.isfinite(likely) for answer in found for _, likely, _ in answer)
    assert counts["attended_tokens"] < 0.6 * counts["context_tokens"]


def step(lengths: list[int], contexts: list[int], ranges: dict):
    """vLLM's metadata of a step whose rows have ``lengths`` query tokens behind ``contexts`` earlier ones."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    seq_lens = torch.tensor([sum(row) for row in zip(lengths, contexts, strict=True)]).int()
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=seq_lens, num_reqs=len(lengths),
        num_actual_tokens=sum(lengths), max_query_len=max(lengths), max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.zeros(len(lengths), 64, dtype=torch.int32),
        slot_mapping=torch.arange(sum(lengths)), seq_lens_cpu_upper_bound=seq_lens, mm_req_doc_ranges=ranges,
    )  # fmt: skip


SPANS = {0: [(2, 9)], 1: [], 2: [(10, 25), (300, 340)], 3: [(600, 650)], 4: [(100, 120)]}


def test_dense_rows_take_their_images_with_them():
    common = step([1, 1, 300, 300, 300], [99, 50, 100, 0, 400], SPANS)
    assert dense.prefill_rows(common, 2, 2).mm_req_doc_ranges == {0: SPANS[2], 1: SPANS[3], 2: SPANS[4]}
    rows = dense.rows_between(common, 2, 4, common.block_table_tensor[2:4])
    assert rows.mm_req_doc_ranges == {0: SPANS[2], 1: SPANS[3]}
    assert dense.short_rows(common, common.seq_lens).mm_req_doc_ranges is None
    text = step([1, 300], [99, 0], None)
    assert dense.prefill_rows(text, 1, 1).mm_req_doc_ranges is None


def test_chunks_with_a_part_of_an_image_do_not_choose_pages():
    """Later queries would be keys of earlier ones; images behind a chunk, or still to come, do not matter."""
    config = SparseConfig(prefill_policy="vertical_slash", min_prefill_tokens=0)
    common = step([1, 1, 300, 300, 300], [99, 50, 100, 0, 400], SPANS)
    assert [chunk.request for chunk in prefill_rows.sparse_chunks(Step(common, 2, 3, 2), config, None)[0]] == [
        3,
        4,
    ]
    exact = Step(common, 2, 3, 2, [0, 0, 0, EXACT, 128])
    assert [chunk.request for chunk in prefill_rows.sparse_chunks(exact, config, None)[0]] == [4]
    for first, last, sparse in ((99, 100, False), (399, 500, False), (0, 99, True), (400, 500, True)):
        common = step([300], [100], {0: [(first, last)]})
        assert bool(prefill_rows.sparse_chunks(Step(common, 0, 1, 0), config, None)[0]) is sparse, (first, last)


@pytest.mark.seam
def test_full_layers_of_gemma_4_are_causal_in_images(monkeypatch):
    """Its model takes the ranges out of the metadata of these layers, in which ours has that of dense rows."""
    from vllm import forward_context
    from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration

    def of_rows(name: str):
        return SimpleNamespace(**{name: object()})

    everywhere, flash, triton = (of_rows(f"mm_prefix_{name}") for name in (
        "range", "query_range_tensor", "range_tensor",
    ))  # fmt: skip
    runs = [PrefillRun(tokens=slice(0, 1), block_table=None, dense=rows) for rows in (flash, triton)]
    ours = SparseMetadata(0, 0, 0, None, None, None, None, None, prefill=runs, dense_all=everywhere)
    context = SimpleNamespace(attn_metadata={"model.layers.5.self_attn.attn": ours})
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)
    model = SimpleNamespace(_full_attn_layer_idxs={5})
    Gemma4ForConditionalGeneration._clear_mm_prefix_for_full_attn_layers(model)
    assert [*vars(everywhere).values(), *vars(flash).values(), *vars(triton).values()] == [None] * 3


@pytest.mark.parametrize(
    ("stock", "head_size", "image_prefix", "reader"),
    [
        ("FLASH_ATTN", 256, False, "FLASH_ATTN"), ("FLASH_ATTN", 512, False, "TRITON_ATTN"),
        ("TRITON_ATTN", 512, True, "TRITON_ATTN"), ("TRITON_FLASH_ATTN", 128, True, "TRITON_ATTN"),
        ("FLASH_ATTN", 128, True, "TRITON_ATTN"),
    ],
)  # fmt: skip
def test_who_reads_wide_heads_and_image_prefixes(stock, head_size, image_prefix, reader):
    chosen = SimpleNamespace(get_name=lambda: stock)
    found = dense.reader_of_pages(chosen, torch.bfloat16, head_size, "auto", image_prefix)
    assert found.get_name() == reader

"""What vLLM's planner makes of sparse pages: one token, large blocks, layers of other sizes beside them."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    compute_layer_kv_cache_shape_bytes,
)

from vllm_sparse.backend.backend import SparseBackend
from vllm_sparse.backend.spec import PageLayout, SparseAttentionSpec, page_size_of
from vllm_sparse.pages.summaries import SUMMARIES, summary_slots

try:
    from vllm.v1.core.kv_cache_planning import is_kv_cache_spec_uniform, unify_kv_cache_spec_page_size
except ImportError:  # before 0.33
    from vllm.v1.core.kv_cache_utils import is_kv_cache_spec_uniform, unify_kv_cache_spec_page_size


def full(heads: int = 8, size: int = 128, block: int = 16) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=size, dtype=torch.bfloat16)


def sparse(heads: int = 8, size: int = 128, block: int = 16, summary: str = "key_range") -> SparseAttentionSpec:
    return SparseBackend.of(PageLayout(summary)).customize_spec(full(heads, size, block))


def sliding(heads: int = 8, size: int = 128) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=16, num_kv_heads=heads, head_size=size, dtype=torch.bfloat16, sliding_window=1024
    )


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 256])
def test_bytes_are_proportional_to_tokens_and_exact_for_one(summary, size):
    page = sparse(size=size, summary=summary)
    rows = 16 + summary_slots(summary, 16, size, 2)
    assert page.page_size_bytes == 8 * rows * 2 * size * 2
    one = sparse(size=size, block=1, summary=summary)
    assert one.page_size_bytes * 16 == page.page_size_bytes, (
        "vLLM aligns hybrids' blocks by the bytes of one token"
    )
    for pages in (2, 33, 49):
        large = sparse(size=size, block=16 * pages, summary=summary)
        if page_size_of(16 * pages, None) == 16:
            assert large.page_size_bytes == pages * page.page_size_bytes
            assert large.num_states == pages * rows


def test_a_large_block_is_split_into_pages():
    spec = sparse(block=528)
    assert (spec.page_size, SparseBackend.get_supported_kernel_block_sizes(spec)) == (16, [16])
    assert compute_layer_kv_cache_shape_bytes(spec, 5, 16) == (5 * 33, 8, 17, 2 * 128 * 2)


def test_pages_of_one_token_take_the_page_size_of_the_config():
    assert [page_size_of(1, size) for size in (None, 16, 64, 528)] == [16, 16, 64, 16]
    assert page_size_of(32, 16) == 32


def test_layers_that_differ_are_told_so_as_vllm_asks():
    for layers in itertools.permutations([sparse(), sliding(), full(4)]):
        assert not is_kv_cache_spec_uniform(dict(zip("abc", layers, strict=True)))
    assert is_kv_cache_spec_uniform({"a": sparse(), "b": sparse()})


@pytest.mark.parametrize(
    "layers",
    [
        (sparse(8), sparse(4)), (sparse(8), full(4)), (sparse(4), sliding(8)), (sparse(8), sliding(4)),
        (sparse(8), sliding(8)), (sparse(2, 64), sliding(8)), (sparse(8), sparse(3)), (sparse(8), full(8, 64)),
    ],
)  # fmt: skip
def test_vllm_brings_layers_of_other_sizes_to_one(layers):
    unified = unify_kv_cache_spec_page_size(dict(zip("ab", layers, strict=True)))
    assert len({spec.page_size_bytes for spec in unified.values()}) == 1
    for before, after in zip(layers, unified.values(), strict=True):
        if isinstance(before, SparseAttentionSpec):
            assert after.page_size == 16, "pages changed their size"
            assert after.block_size % 16 == 0


def test_a_spec_that_is_not_plain_full_attention_is_refused():
    with pytest.raises(ValueError, match="SlidingWindowSpec; use another --attention-backend"):
        SparseBackend.of(PageLayout("key_range")).customize_spec(sliding())

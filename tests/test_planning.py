"""Caches that vLLM's planner makes of our specs beside its own: every layer has its page, no byte is shared."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from vllm_sparse.backend import compat
from vllm_sparse.backend.spec import PageLayout, SparseAttentionSpec

pytestmark = pytest.mark.seam

PAGE, MEMORY = 32, 8 << 20
SHAPE = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


def plan(tiny, specs: dict, layout):
    """The cache of one worker whose layers have ``specs``."""
    try:
        from vllm.v1.core import kv_cache_planning as planner
    except ImportError:  # before 0.33
        from vllm.v1.core import kv_cache_utils as planner

    config = EngineArgs(
        str(tiny.model()), block_size=PAGE, max_model_len=256, dtype="float32"
    ).create_engine_config()
    config.cache_config.kv_cache_layout = layout.name
    with set_current_vllm_config(config):
        arguments = [config, [specs], [MEMORY]]
        if "global_kv_cache_groups" in inspect.signature(planner.get_kv_cache_configs).parameters:
            arguments.append(planner.get_global_kv_cache_groups(config, [specs]))
        (cache,) = planner.get_kv_cache_configs(*arguments)
    return cache


def full(heads: int = 2, summary: str | None = "key_range", dtype: torch.dtype = torch.float32):
    spec = FullAttentionSpec(block_size=PAGE, **{**SHAPE, "num_kv_heads": heads, "dtype": dtype})
    return spec if summary is None else SparseAttentionSpec.extend(spec, PAGE, PageLayout(summary))


def window(heads: int = 2):
    return SlidingWindowSpec(block_size=PAGE, sliding_window=64, **{**SHAPE, "num_kv_heads": heads})


def linear(page_bytes: int):
    """A linear layer, whose page vLLM has padded to that of the attention layers."""
    shapes = ((16, 4), (4, 8, 8))
    return MambaSpec(
        block_size=256, shapes=shapes, dtypes=(torch.float32,) * 2, page_size_padded=page_bytes
    )  # fmt: skip


STOCK = full(summary=None)
SEVERAL = SparseAttentionSpec.extend(
    FullAttentionSpec(block_size=3 * PAGE, **SHAPE), 16, PageLayout("key_range", page_size=16)
)
# Models by the specs of their layers.
MODELS = {
    "plain": [full() for _ in range(4)],
    "without_a_summary": [full(summary="none") for _ in range(3)],
    "sketches": [full(summary="sketch2") for _ in range(3)],
    "sliding_window": [window(), full(), window(), full()],
    "sliding_window_few_full": [window(), window(), window(), full()],
    "wider_sliding_window": [window(5), full(), window(5), full()],
    "dense_beside_sparse": [full(), STOCK],
    "quantised": [full(dtype=torch.uint8) for _ in range(4)],
    "quantised_but_for_one": [full(dtype=torch.uint8), full(dtype=torch.uint8), full()],
    "draft_of_half_the_heads": [full(4), full(4), full(2, None)],
    "sparse_draft_of_half_the_heads": [full(4), full(4), full(2)],
    "linear": [linear(STOCK.page_size_bytes), STOCK, linear(STOCK.page_size_bytes)],
    "linear_beside_several_pages": [linear(SEVERAL.page_size_bytes), SEVERAL, linear(SEVERAL.page_size_bytes)],
}


@pytest.mark.parametrize("layout", compat.head_major_layouts(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", MODELS)
def test_every_layer_has_its_pages(tiny, case, layout):
    specs = {f"model.layers.{number}.attn": spec for number, spec in enumerate(MODELS[case])}
    cache = plan(tiny, specs, layout)
    planned = [name for group in cache.kv_cache_groups for name in group.layer_names]
    assert sorted(planned) == sorted(specs)
    assert cache.num_blocks > 256 // PAGE
    places = {}
    for tensor in cache.kv_cache_tensors:
        assert tensor.size <= MEMORY
        for number, name in enumerate(tensor.layers):
            places[name] = (tensor, tensor.offset + number * tensor.layer_stride)
    assert sorted(places) == sorted(specs)
    for group in cache.kv_cache_groups:
        pages = []
        for name in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            assert type(spec) is type(specs[name]), f"{name} got a spec of another kind"
            if isinstance(spec, SparseAttentionSpec):
                assert spec.layout == specs[name].layout
            tensor, first = places[name]
            starts = (first + block * tensor.block_stride for block in range(cache.num_blocks))
            pages += [(start, start + spec.real_page_size_bytes) for start in starts]
        pages.sort()
        assert pages[-1][1] <= MEMORY
        assert all(end <= start for (_, end), (start, _) in pairwise(pages)), "layers of a group share bytes"

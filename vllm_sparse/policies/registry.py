"""The names of ``SparseConfig.decode_policy`` and ``SparseConfig.prefill_policy``, and presets of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.policies import positions
from vllm_sparse.policies.base import DecodePolicy, PrefillPolicy, PrefillSizes
from vllm_sparse.policies.baselines import Dense, DensePrefill, Oracle, Random, Streaming
from vllm_sparse.policies.block_scores import BlockSparse, XAttention
from vllm_sparse.policies.flex_prefill import FlexPrefill
from vllm_sparse.policies.key_range import KeyRange
from vllm_sparse.policies.positions import ByPosition
from vllm_sparse.policies.sampled_queries import SampledQueries
from vllm_sparse.policies.sketch import Sketch
from vllm_sparse.policies.vertical_slash import VerticalSlash

DECODE_POLICIES: dict[str, DecodePolicy] = {
    "quest": KeyRange(slack=1.0),
    "midbound": KeyRange(slack=0.5),
    "arkvale": KeyRange(slack=0.0),
    "sketch": Sketch(bits=1),
    "sketch2": Sketch(bits=2),
    "twilight": Sketch(bits=2, adaptive=True),
    "streaming": Streaming(),
    "oracle": Oracle(),
    "random": Random(),
    "dense": Dense(),
}
"""Instances: a decode policy has no state, so all layers of all engines share it."""

POSITIONS: dict[str, positions.Sized] = {
    "a_shape": positions.a_shape,
    "strided": positions.strided,
    "dilated": positions.dilated,
    "longformer": positions.longformer,
    "bigbird": positions.bigbird,
}
"""Prefill policies that never look at a key."""

PRESETS: dict[str, dict[str, str]] = {
    "balanced": {"decode_policy": "sketch"},
    "quality": {"decode_policy": "sketch2"},
    "fast": {"decode_policy": "midbound"},
}
"""Values of ``SparseConfig.preset``: what each of them sets, where nothing else does."""

PREFILL_POLICIES: dict[str, Callable[[PrefillSizes, int, HeadPatterns], PrefillPolicy]] = {
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
    "xattention": XAttention,
    "flex_prefill": FlexPrefill,
    "sampled_queries": SampledQueries,
    "auto": SampledQueries,
    **{name: partial(ByPosition, pattern) for name, pattern in POSITIONS.items()},
    "dense": DensePrefill,
}
"""Constructors, called for each layer with sizes, page size and the patterns of its query heads.

``auto`` chooses for those chunks for which that is faster (:mod:`vllm_sparse.prefill.gate`)."""

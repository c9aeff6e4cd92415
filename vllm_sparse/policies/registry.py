"""Names of policies, as used in ``SparseConfig.decode_policy`` and ``SparseConfig.prefill_policy``."""

from __future__ import annotations

from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.policies.a_shape import AShape
from vllm_sparse.policies.arkvale import ArkVale
from vllm_sparse.policies.base import DecodePolicy
from vllm_sparse.policies.bigbird import BigBird
from vllm_sparse.policies.block_sparse import BlockSparse
from vllm_sparse.policies.dense import Dense
from vllm_sparse.policies.dilated import Dilated
from vllm_sparse.policies.flex_prefill import FlexPrefill
from vllm_sparse.policies.longformer import Longformer
from vllm_sparse.policies.midbound import Midbound
from vllm_sparse.policies.oracle import Oracle
from vllm_sparse.policies.prefill_base import PrefillPolicy
from vllm_sparse.policies.prefill_dense import DensePrefill
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.random import Random
from vllm_sparse.policies.sketch import Sketch
from vllm_sparse.policies.sketch2 import Sketch2
from vllm_sparse.policies.streaming import Streaming
from vllm_sparse.policies.strided import Strided
from vllm_sparse.policies.twilight import Twilight
from vllm_sparse.policies.vertical_slash import VerticalSlash
from vllm_sparse.policies.xattention import XAttention

DECODE_POLICIES: dict[str, type[DecodePolicy]] = {
    "quest": Quest,
    "midbound": Midbound,
    "arkvale": ArkVale,
    "sketch": Sketch,
    "sketch2": Sketch2,
    "twilight": Twilight,
    "streaming": Streaming,
    "oracle": Oracle,
    "random": Random,
    "dense": Dense,
}

PREFILL_POLICIES: dict[str, type[PrefillPolicy]] = {
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
    "xattention": XAttention,
    "flex_prefill": FlexPrefill,
    "a_shape": AShape,
    "strided": Strided,
    "dilated": Dilated,
    "longformer": Longformer,
    "bigbird": BigBird,
    "dense": DensePrefill,
}


def get_decode_policy(name: str) -> DecodePolicy:
    return DECODE_POLICIES[name]()


def get_prefill_policy(config: SparseConfig, page_size: int, patterns: HeadPatterns) -> PrefillPolicy:
    return PREFILL_POLICIES[config.prefill_policy](config, page_size, patterns)

"""Names of decode policies, as used in ``SparseConfig.decode_policy``."""

from __future__ import annotations

from vllm_sparse.policies.base import DecodePolicy
from vllm_sparse.policies.dense import Dense
from vllm_sparse.policies.midbound import Midbound
from vllm_sparse.policies.oracle import Oracle
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.random import Random
from vllm_sparse.policies.streaming import Streaming

DECODE_POLICIES: dict[str, type[DecodePolicy]] = {
    "quest": Quest,
    "midbound": Midbound,
    "streaming": Streaming,
    "oracle": Oracle,
    "random": Random,
    "dense": Dense,
}


def get_decode_policy(name: str) -> DecodePolicy:
    return DECODE_POLICIES[name]()

"""Batch specs: ``8q1s32k`` is 8 requests of 1 query token over 32,768 context tokens; ``_`` joins groups."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_GROUP = re.compile(r"(\d+)?q(\d+)(k?)s(\d+)(k?|m?)")


@dataclass(frozen=True)
class Request:
    query_tokens: int
    context_tokens: int


def parse(spec: str) -> list[Request]:
    """Requests of a batch spec; ``k`` is 1,024 and ``m`` 1,048,576 tokens."""
    requests = []
    for part in spec.split("_"):
        match = _GROUP.fullmatch(part)
        if not match:
            raise ValueError(f"batch spec {part!r}: expected COUNTqQUERYsCONTEXT, such as 8q1s32k")
        count, query, query_k, context, unit = match.groups()
        scale = {"": 1, "k": 1 << 10, "m": 1 << 20}
        request = Request(int(query) * scale[query_k], int(context) * scale[unit])
        requests += [request] * int(count or 1)
    return requests


def max_num_seqs(batches: Iterable[list[Request]]) -> int:
    """Most requests of a batch, up to a size that vLLM captures a CUDA graph for: 1, 2, 4, then eights."""
    most = max(map(len, batches))
    return 1 << (most - 1).bit_length() if most <= 4 else -(-most // 8) * 8

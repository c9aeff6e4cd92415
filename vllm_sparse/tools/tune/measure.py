"""MeasuredPrefill: chunks are attended densely, and under every candidate beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.query_blocks import BLOCK_TOKENS
from vllm_sparse.prefill.attend import SparsePrefill


class CountingAttention(AttentionKernel):
    """A kernel that passes query blocks on to ``attention`` and adds up what each head attends to."""

    def __init__(self, attention: AttentionKernel):
        self.attention = attention
        self.pairs: torch.Tensor | None = None
        """int64 [q_heads]: attended (query, key) pairs are added to it; None: they are not counted."""

    @classmethod
    def unsupported(cls, shape):
        return None

    def attend(self, q, kv, table, geometry, out):
        self.attention.attend(q, kv, table, geometry, out)

    def attend_blocks(self, q, kv, table, geometry, out, scratch):
        if self.pairs is not None:
            num_blocks = -(-len(q) // BLOCK_TOKENS)
            queries = torch.full((num_blocks,), BLOCK_TOKENS, device=q.device)
            queries[-1] = len(q) - (num_blocks - 1) * BLOCK_TOKENS
            # Query i of the n in a block sees all but the last n - 1 - i tokens of its row.
            seen = table.lengths.view(-1, num_blocks) * queries - queries * (queries - 1) // 2
            self.pairs += seen.sum(1)
        self.attention.attend_blocks(q, kv, table, geometry, out, scratch)


@dataclass
class MeasuredPrefill(SparsePrefill):
    """A layer's sparse prefill whose output is dense, so that later layers see true inputs."""

    candidates: Sequence[HeadPatterns] = ()
    everything: HeadPatterns | None = None
    error: torch.Tensor | None = None
    """float64 [candidates, q_heads]: squared distance from the dense output, summed."""
    norm: torch.Tensor | None = None
    """float64 [q_heads]: squared dense output, summed."""
    pairs: torch.Tensor | None = None
    """int64 [candidates, q_heads]: (query, key) pairs attended."""
    causal_pairs: int = 0
    """(query, key) pairs of dense attention, per head."""

    @classmethod
    def around(cls, prefill: SparsePrefill, candidates: Sequence[HeadPattern]) -> MeasuredPrefill:
        """``prefill`` of a layer with the policy ``vertical_slash``, measured."""
        q_heads, device = prefill.buffers.q_heads, prefill.buffers.head_pages.device

        def in_all_heads(pattern: HeadPattern) -> HeadPatterns:
            return HeadPatterns.of([pattern] * q_heads, prefill.buffers.page_size, device)

        measured = cls(
            **{field.name: getattr(prefill, field.name) for field in fields(SparsePrefill)},
            candidates=[in_all_heads(candidate) for candidate in candidates],
            everything=in_all_heads(HeadPattern(top_p=1.0)),
        )
        measured.attention = CountingAttention(prefill.attention)
        measured.reset()
        return measured

    def reset(self) -> None:
        """Start the sums afresh."""
        q_heads, device = self.buffers.q_heads, self.buffers.head_pages.device
        shape = (len(self.candidates), q_heads)
        self.error = torch.zeros(shape, dtype=torch.float64, device=device)
        self.norm = torch.zeros(q_heads, dtype=torch.float64, device=device)
        self.pairs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.causal_pairs = 0

    def take(self) -> dict:
        """The sums since the last time, as plain data; waits for the device."""
        found = {name: getattr(self, name).tolist() for name in ("error", "norm", "pairs")}
        found["causal_pairs"] = self.causal_pairs
        self.reset()
        return found

    def attend(self, q, kv, block_table, chunk, out):
        tokens = chunk.tokens()
        self.policy.patterns, self.attention.pairs = self.everything, None
        super().attend(q, kv, block_table, chunk, out)
        dense = out[tokens].float()
        self.norm += dense.square().sum((0, 2), dtype=torch.float64)
        self.causal_pairs += chunk.num_tokens * chunk.end_position - chunk.num_tokens * (chunk.num_tokens - 1) // 2
        found = torch.empty_like(out)
        for index, patterns in enumerate(self.candidates):
            self.policy.patterns, self.attention.pairs = patterns, self.pairs[index]
            super().attend(q, kv, block_table, chunk, found)
            self.error[index] += (found[tokens].float() - dense).square().sum((0, 2), dtype=torch.float64)

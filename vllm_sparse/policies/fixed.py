"""What the prefill policies share that choose by position alone."""

from __future__ import annotations

from abc import abstractmethod

from vllm_sparse import kernels
from vllm_sparse.fixed_pattern import FixedPattern
from vllm_sparse.policies.prefill_base import PrefillPolicy


class FixedPolicy(PrefillPolicy):
    """Pages by a :class:`FixedPattern`, which ``vertical_tokens`` and ``slash_tokens`` size."""

    @abstractmethod
    def pattern(self, vertical_tokens: int, slash_tokens: int) -> FixedPattern:
        """The pattern for tokens kept wherever the query is, and tokens kept by their distance."""

    def choose(self, q, kv, block_table, blocks, scale, buffers, keep):
        pattern = self.pattern(self.config.vertical_tokens, self.config.slash_tokens)
        kernels.for_device(q.device).fixed_pattern(pattern, blocks, self.page_size, keep)

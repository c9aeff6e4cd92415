"""The reference in plain torch: any device, any dtype."""

from __future__ import annotations

from vllm_sparse.attention.base import AttentionKernel, AttentionShape
from vllm_sparse.kernels import reference


class TorchAttention(AttentionKernel):
    """Gathers the chosen pages and attends in float32. Runs the CPU backend."""

    reads_unlisted_rows = True

    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        return None

    def attend(self, q, kv, table, geometry, out, host=None, exponents=None):
        reference.sparse_decode(q, kv, table, geometry, out, host, exponents)

    def attend_blocks(self, q, kv, table, geometry, out, scratch):
        reference.sparse_prefill(q, kv, table, geometry, out)

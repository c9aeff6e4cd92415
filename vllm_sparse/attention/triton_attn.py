"""Split-K paged attention in Triton: any CUDA GPU."""

from __future__ import annotations

from vllm_sparse.attention.base import AttentionKernel, AttentionShape


class TritonAttention(AttentionKernel):
    """Flash-decoding over the page table (:mod:`vllm_sparse.kernels.sparse_decode`)."""

    reads_unlisted_rows = True

    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        if shape.device.type != "cuda":
            return f"needs a GPU, and this is {shape.device.type}"
        return None

    def attend(self, q, kv, table, geometry, out, host=None, exponents=None):
        from vllm_sparse.kernels.sparse_decode import sparse_decode

        sparse_decode(q, kv, table, geometry, out, host, exponents)

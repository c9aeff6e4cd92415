"""What an attention kernel is: attention over a PageTable, of decode rows or of query blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_sparse import kernels
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_table import PageTable


@dataclass(frozen=True)
class AttentionShape:
    """What an attention kernel must know of a layer to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    """Of queries and outputs."""
    geometry: Geometry
    kv_dtype: torch.dtype
    """Of the cache: ``dtype``, or ``torch.float8_e4m3fn``."""


class AttentionKernel(ABC):
    """Computes attention over chosen pages. It knows nothing of how pages are chosen."""

    reads_unlisted_rows = False
    """Whether :meth:`attend` reads rows that ``table.routes`` leaves to the block table. Beside a kernel that does
    not, a dense backend takes the prompt tokens in decode steps without drafts."""

    @classmethod
    @abstractmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        """Why this kernel cannot serve ``shape`` here, or None if it can."""

    def unreadable(self, kv: torch.Tensor, page_size: int) -> str | None:
        """Why this kernel cannot read the cache ``kv`` that vLLM has laid out, or None if it can."""
        return None

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        table: PageTable,
        geometry: Geometry,
        out: torch.Tensor,
        host: torch.Tensor | None = None,
        exponents: torch.Tensor | None = None,
    ) -> None:
        """Write the attention of each query over its pages to ``out``, one query token per request.

        Args:
            q: [num_reqs, q_heads, head_dim].
            kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim].
            table: the chosen pages; rows of length 0 leave ``out`` untouched.
            geometry: of the layer.
            out: [num_reqs, q_heads, head_dim], the dtype of ``q``.
            host: [num_blocks, kv_heads, page_size, 2 * head_dim]: a head page below 0 in ``table`` is head page
                ``~head_page`` of it. Given to the kernels of ``OFFLOAD_ORDER`` only.
            exponents: uint8 [num_blocks, kv_heads, 2], where ``host`` is e4m3.
        """

    def attend_rows(self, q: torch.Tensor, kv: torch.Tensor, table: PageTable, *others) -> None:
        """Attend the rows of a decode step; arguments as in :meth:`attend`.

        Where requests have several query tokens, ``q`` and ``out`` are [num_tokens, q_heads, head_dim], those of
        ``table.queries``, and kernels of this project attend. They also read rows that ``table.routes`` leaves to
        the block table.
        """
        attend = self.attend
        if table.queries.starts is not None:
            attend = kernels.for_device(q.device).sparse_decode
        attend(q, kv, table, *others)

    def attend_blocks(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        table: PageTable,
        geometry: Geometry,
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """Write the attention of one request's query blocks over their pages to ``out``.

        Query i of the n in a block sees all but the last ``n - 1 - i`` tokens of its row. Unless a kernel
        does it in its own way, kernels of this project do.

        Args:
            q: [num_tokens, q_heads, head_dim], blocks of 128 tokens, the last one may be partial.
            kv: [num_blocks, kv_heads, page_size + summary slots, 2 * head_dim].
            table: the chosen pages; row ``head * num_blocks + block``, a block's own pages last; with ``starts``.
            geometry: of the layer.
            out: [num_tokens, q_heads, head_dim], the dtype of ``q``.
            scratch: [2, num_tokens * q_heads * head_dim or more] of undefined contents; empty on a CPU.
        """
        kernels.for_device(q.device).sparse_prefill(q, kv, table, geometry, out)

"""xFormers' paged split-K attention as a page-sparse attention kernel, unmodified."""

from __future__ import annotations

import torch

from vllm_sparse.attention.base import AttentionKernel, AttentionShape
from vllm_sparse.pages.layout import HeadPageGrid, single_head_pages
from vllm_sparse.pages.page_table import PageTable

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Head sizes; xFormers takes 512 too, but its tiles then outgrow the shared memory of most GPUs."""
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 16, 64
"""The least that a tensor core takes, and xFormers' own choice; a tile must not straddle pages."""


class XFormersAttention(AttentionKernel):
    """Every (request, KV head) is a sequence over single-head pages; its group are the query heads.

    Lefaudeux et al., "xFormers", github.com/facebookresearch/xformers 0.0.35,
    ``xformers/ops/fmha/triton_splitk.py``; the method is Dao et al., "Flash-Decoding for
    long-context inference", 2023.
    """

    @classmethod
    def unsupported(cls, shape: AttentionShape) -> str | None:
        if shape.device.type != "cuda":
            return f"needs a GPU, and this is {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"computes float16 and bfloat16, not {shape.dtype}"
        if shape.kv_dtype is torch.float8_e4m3fn:
            return "reads no fp8 KV cache"
        if not shape.geometry.plain:
            return "knows no soft caps and no sink logits"
        if shape.geometry.head_dim not in HEAD_DIMS:
            return f"head_dim {shape.geometry.head_dim} is none of {HEAD_DIMS}"
        if shape.geometry.page_size % MIN_TILE_TOKENS:
            return f"page size {shape.geometry.page_size} is not a multiple of {MIN_TILE_TOKENS}"
        if torch.cuda.get_device_capability(shape.device) < (8, 0):
            return "needs compute capability 8.0 or later"
        try:
            from xformers.ops.fmha.triton_splitk import FwOp  # noqa: F401
        except Exception as error:  # a build for another torch fails in any way, and ``auto`` asks too
            return f"xformers is not installed, or not for this torch ({error})"
        return None

    def __init__(self) -> None:
        from xformers.ops.fmha import attn_bias, common, triton_splitk

        self._op = triton_splitk.FwOp
        self._inputs = common.Inputs
        self._bias = attn_bias

    def unreadable(self, kv, page_size):
        page_slots, uneven = divmod(HeadPageGrid.of(kv).stride, kv.stride(2))
        tile_tokens = _tile_tokens(page_size)
        if not uneven and page_slots // tile_tokens == page_size // tile_tokens:
            return None
        return (
            f"xformers needs pages of {page_size} to {page_size + tile_tokens - 1} slots, each KV "
            f"head's together and whole pages apart, not {HeadPageGrid.of(kv).stride / kv.stride(2):g} slots"
        )

    def attend(self, q, kv, table, geometry, out, host=None, exponents=None):
        assert host is None, "this kernel attends to pages on the GPU only"
        num_reqs, q_heads, head_dim = q.shape
        kv_heads = kv.shape[1]
        rows, group = num_reqs * kv_heads, q_heads // kv_heads
        tile_tokens = _tile_tokens(geometry.page_size)
        # Slots from one head page to the next, summary included: what xFormers is told the page size is. It walks
        # tiles of ``tile_tokens`` tokens and uses the page size twice: it finds tile t in page
        # ``t // (page size // tile_tokens)``, and starts a page at slot ``id * page size``. The second wants the
        # summary counted; the first rounds it away while it is less than a tile. Lengths stay in tokens, and the
        # last tile of a page ends before its summary.
        page_slots = HeadPageGrid.of(kv).stride // kv.stride(2)
        keys, values = (
            # Heads broadcast by stride 0: it then packs the group into one tile of queries.
            pages.as_strided(
                (1, (len(pages) - 1) * page_slots + geometry.page_size, 1, group, head_dim),
                (0, kv.stride(2), 0, 0, 1),
            )
            for pages in single_head_pages(kv, geometry.page_size)
        )
        # ``apply`` is what memory_efficient_attention_forward ends in. The checks before it would
        # refuse ``page_slots`` of summaries, and unsupported() has made the ones that matter.
        # Splits are chosen from shapes alone, so CUDA graphs replay them with any lengths.
        result, _ = self._op.get_operator(None, block_n=tile_tokens).apply(
            self._inputs(
                query=q.reshape(1, rows, 1, group, head_dim),
                key=keys,
                value=values,
                attn_bias=self._paged_bias(table, page_slots),
                scale=geometry.scale,
            ),
            needs_gradient=False,
        )
        # It writes zeros for empty sequences, and those rows of ``out`` belong to the dense backend.
        attended = (table.lengths > 0).view(num_reqs, kv_heads, 1, 1)
        heads = (num_reqs, kv_heads, group, head_dim)
        torch.where(attended, result.view(heads), out.view(heads), out=out.view(heads))

    def _paged_bias(self, table: PageTable, page_slots: int):
        """The mask of one query per row of ``table``, without bringing its lengths to the host.

        The op reads ``k_seqinfo.seqlen`` and ``block_tables`` on the device and, of the host's
        fields, only ``max_seqlen``; the other fields are upper bounds. ``seqstart`` is for several
        queries per sequence and for keys that are not paged, so any tensor of the device does.
        """
        rows, max_pages = table.head_pages.shape
        max_tokens = max_pages * page_slots
        queries = self._bias._SeqLenInfo(
            seqstart=table.lengths, max_seqlen=1, min_seqlen=1, seqstart_py=range(rows + 1)
        )
        keys = self._bias._PaddedSeqLenInfo(
            seqstart=table.lengths,
            max_seqlen=max_tokens,
            min_seqlen=0,
            seqstart_py=range(0, rows * max_tokens + 1, max_tokens),
            seqlen=table.lengths,
            seqlen_py=(max_tokens,) * rows,
            padding=max_tokens,
        )
        return self._bias.PagedBlockDiagonalPaddedKeysMask(queries, keys, table.head_pages, page_slots)


def _tile_tokens(page_size: int) -> int:
    return min(page_size & -page_size, MAX_TILE_TOKENS)

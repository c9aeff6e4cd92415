"""prefill_table: a keep mask of (query head, query block, page), as a PageTable.

    chosen[r, p] = keep[r, p]  or  p < sink_pages  or  window_start <= p,    p <= last
    head_pages[r] = head pages of the chosen pages, ascending
    lengths[r]    = tokens of those pages up to the block's last query
    starts[r]     = first query of the block, counted over the queries of all heads in turn

``last`` is the page of the block's last query and ``window_start`` the page of the first token that
the recent window of its first query holds, so a block's own pages are always there, complete and at
the end of its row. Attention that aligns causality to the end of the row (query i of n sees all but
the last n - 1 - i tokens) is then exact, wherever in a page chunk and block begin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import BLOCK_TOKENS
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.pages.selection import Selection

BLOCK: tl.constexpr = tl.constexpr(1024)
"""Pages of a row that are worked on at a time."""


# A launch for every width of the table must not be a compilation for it.
@triton.jit(
    do_not_specialize=[
        "keep_stride", "table_stride_row", "first_position", "end_position", "num_blocks", "sink_pages",
        "window_tokens",
    ]
)  # fmt: skip
def _prefill_table(
    keep_ptr, block_table_ptr, head_pages_ptr, lengths_ptr, starts_ptr, counters_ptr, keep_stride,
    table_stride_row, per_block, per_head, first_position, end_position, num_blocks, sink_pages, window_tokens,
    GROUP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = row // num_blocks // GROUP
    start = first_position + (row % num_blocks) * BLOCK_TOKENS
    end = tl.minimum(start + BLOCK_TOKENS, end_position)
    pages_before_end = (end + PAGE - 1) // PAGE
    window_start = tl.maximum(start + 1 - tl.maximum(window_tokens, 1), 0) // PAGE
    keep_row = keep_ptr + row.to(tl.int64) * keep_stride
    table_row = head_pages_ptr + row.to(tl.int64) * table_stride_row
    kept = 0
    for first in range(0, pages_before_end, BLOCK):
        page = first + tl.arange(0, BLOCK)
        live = page < pages_before_end
        chosen = tl.load(keep_row + page, mask=live, other=0) > 0
        chosen = live & (chosen | (page < sink_pages) | (page >= window_start))
        count = chosen.to(tl.int32)
        place = kept + tl.cumsum(count, axis=0) - 1
        block = tl.load(block_table_ptr + page, mask=chosen, other=0)
        tl.store(table_row + place, block * per_block + head * per_head, mask=chosen)
        kept += tl.sum(count, axis=0)
    length = end - (pages_before_end - kept) * PAGE
    tl.store(lengths_ptr + row, length)
    num_tokens = end_position - first_position
    tl.store(starts_ptr + row, row // num_blocks * num_tokens + start - first_position)
    if row == tl.num_programs(0) - 1:
        tl.store(starts_ptr + row + 1, (row // num_blocks + 1) * num_tokens)
    # Query i of n sees length - (n - 1 - i) tokens of the table, and end - (n - 1 - i) of its context.
    queries = (end - start).to(tl.int64)
    unseen = queries * (queries - 1) // 2
    tl.atomic_add(counters_ptr, queries * length - unseen)
    tl.atomic_add(counters_ptr + 1, queries * end - unseen)


def prefill_table(
    keep: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
    kv: torch.Tensor,
    selection: Selection,
    counters: torch.Tensor,
    table: PageTable,
) -> None:
    """Fill the page table of query blocks.

    Args:
        keep: uint8 [q_heads * num_blocks, num_pages]; above 0: attend.
        block_table: int32 [max_pages] of the request.
        blocks: the query blocks.
        kv: [num_blocks, kv_heads, rows, 2 * head_dim]; only its shape and strides are read.
        selection: first pages, and tokens up to each query's own, that are always kept.
        counters: int64 [2]: (query, key) pairs attended, and causal ones, are added.
        table: [q_heads * num_blocks] rows of num_pages, with ``starts``; overwritten.
    """
    rows, num_pages = keep.shape
    num_blocks = blocks.num_blocks
    q_heads = rows // num_blocks
    assert rows == q_heads * num_blocks == table.lengths.shape[0] and table.head_pages.shape == keep.shape
    assert num_pages == blocks.num_pages(selection.page_size) and table.starts.shape == (rows + 1,)
    assert keep.stride(1) == table.head_pages.stride(1) == block_table.stride(0) == 1
    grid = HeadPageGrid.of(kv)
    _prefill_table[(rows,)](
        keep, block_table, table.head_pages, table.lengths, table.starts, counters, keep.stride(0),
        table.head_pages.stride(0), grid.per_block, grid.per_head, blocks.first_position, blocks.end_position,
        num_blocks, selection.sink_pages, selection.window_tokens,
        GROUP=q_heads // kv.shape[1], PAGE=selection.page_size, num_warps=4,
    )  # fmt: skip

"""stop_at_top_p: of the pages chosen for a KV head, the fewest that hold a share of its attention.

    kept = forced pages, then the largest masses, until  sum_{p in kept} mass[p] >= top_p * group

where a head's masses, forced pages included, add up to 1 over its whole context. Pages of a mass equal to
the last one kept are kept too. A row that does not reach its share within the budget keeps all of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.row_budget import row_budget
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection

FORCED: tl.constexpr = tl.constexpr(0x80000000)
"""Set in the keys of forced pages; the rest of a key is the bits of its mass, plus 1."""


@triton.jit
def _stop_at_top_p(
    chosen_keys_ptr, seq_lens_ptr, score_offsets_ptr, budgets_ptr, head_pages_ptr, lengths_ptr, keys_stride,
    table_stride_row, budget_pages, target,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, BUDGET_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    request = row // KV_HEADS
    if tl.load(score_offsets_ptr + request) < 0:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    places = tl.arange(0, BUDGET_PAD)
    mask = places < row_budget(tl.load(budgets_ptr + request), budget_pages)
    keys = tl.load(chosen_keys_ptr + row.to(tl.int64) * keys_stride + places, mask=mask, other=0).to(tl.uint32)
    head_page = tl.load(head_pages_ptr + row.to(tl.int64) * table_stride_row + places, mask=mask, other=0)
    forced = keys >= FORCED
    bits = tl.where(mask, (keys & 0x7FFFFFFF).to(tl.int32) - 1, 0)
    mass = bits.to(tl.float32, bitcast=True)
    # Search for the largest threshold whose masses reach the target; 0 keeps all, whether or not they do.
    low, high = 0, 0x7F800000
    while high - low > 1:
        middle = low + (high - low) // 2
        held = tl.sum(tl.where(forced | (bits >= middle), mass, 0.0), axis=0)
        if held >= target:
            low = middle
        else:
            high = middle
    # Where forced pages reach it alone, every threshold did, up to one above all masses.
    keep = mask & (forced | (bits >= low))
    kept = tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()  # all threads have read their head pages
    tl.store(
        head_pages_ptr + row.to(tl.int64) * table_stride_row + tl.cumsum(keep.to(tl.int32), axis=0) - 1,
        head_page,
        mask=keep,
    )
    tl.store(lengths_ptr + row, seq_len - ((seq_len + PAGE - 1) // PAGE - kept) * PAGE)


def stop_at_top_p(
    chosen_keys: torch.Tensor,
    plan: DecodePlan,
    kv_heads: int,
    group: int,
    selection: Selection,
    budget_pages: int,
    table: PageTable,
) -> None:
    """Shorten the scored rows of ``table``, whose head pages are those of ``select_pages``.

    Args:
        chosen_keys: uint32 [num_reqs * kv_heads, budget_pages or more], the keys of the chosen pages.
        plan: this step's routing, and the budgets that its rows ask for.
        kv_heads, group: heads of the cache, and query heads that share one.
        selection: as in ``select_pages``; ``top_p`` above 0, at most 1.
        budget_pages: pages chosen of rows that ask for nothing.
        table: its head pages are compacted in place, and its lengths written anew.
    """
    rows = plan.table_seq_lens.shape[0] * kv_heads
    _stop_at_top_p[(rows,)](
        chosen_keys, plan.table_seq_lens, plan.score_offsets, plan.budgets, table.head_pages, table.lengths,
        chosen_keys.stride(0), table.head_pages.stride(0), budget_pages, selection.top_p * group,
        KV_HEADS=kv_heads, PAGE=selection.page_size, BUDGET_PAD=triton.next_power_of_2(budget_pages),
        num_warps=4,
    )  # fmt: skip

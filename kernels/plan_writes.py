"""plan_writes: the pages that a step writes to, from its slot mapping, on the device.

    token t starts a staged page  iff  its block is not that of token t - 1
    staged_slots[t] = (staged pages begun up to t, less one) * page_size + row

Tokens that share a page are neighbours in the batch, as ``page_write`` has it, and no two requests
write to one page. One program; once per step, before the first layer's writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.pages.write_plan import WritePlan

TUNING = {"block": 1024}
"""Tokens read at a time."""


@triton.jit(do_not_specialize=["num_tokens", "layers"])
def _plan_writes(
    slots_ptr, staged_slots_ptr, blocks_ptr, first_row_ptr, end_row_ptr, num_pages_ptr, clock_ptr,
    num_misses_ptr, num_tokens, layers,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pages = 0
    for first in range(0, num_tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < num_tokens
        slot = tl.load(slots_ptr + token, mask=live, other=-1)
        before = tl.load(slots_ptr + token - 1, mask=live & (token > 0), other=-1)
        after = tl.load(slots_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
        written, block, row = slot >= 0, slot // PAGE, slot % PAGE
        starts = written & ((before < 0) | (before // PAGE != block))
        ends = written & ((after < 0) | (after // PAGE != block))
        staged = pages + tl.cumsum(starts.to(tl.int32), axis=0) - 1
        tl.store(staged_slots_ptr + token, tl.where(written, staged * PAGE + row, -1), mask=live)
        tl.store(blocks_ptr + staged, block.to(tl.int32), mask=starts)
        tl.store(first_row_ptr + staged, row.to(tl.int32), mask=starts)
        tl.store(end_row_ptr + staged, (row + 1).to(tl.int32), mask=ends)
        pages += tl.sum(starts.to(tl.int32), axis=0)
    tl.store(num_pages_ptr, pages)
    tl.store(clock_ptr, tl.load(clock_ptr) + 1)
    for first in range(0, layers, BLOCK):
        layer = first + tl.arange(0, BLOCK)
        tl.store(num_misses_ptr + layer, tl.zeros([BLOCK], tl.int32), mask=layer < layers)


def plan_writes(slot_mapping: torch.Tensor, page_size: int, plan: WritePlan) -> None:
    """Fill ``plan`` for this step, advance its clock and forget the misses of the step before.

    Args:
        slot_mapping: int64 [num_tokens], ``block * page_size + row``; -1 skips a token.
        page_size: tokens per page.
        plan: buffers for ``num_tokens`` tokens or more.
    """
    num_tokens = slot_mapping.shape[0]
    assert num_tokens <= plan.staged_slots.shape[0], (
        f"{num_tokens} tokens in a step of {plan.staged_slots.shape[0]}"
    )
    _plan_writes[(1,)](
        slot_mapping, plan.staged_slots, plan.blocks, plan.first_row, plan.end_row, plan.num_pages, plan.clock,
        plan.num_misses, num_tokens, plan.num_misses.shape[0],
        PAGE=page_size, BLOCK=TUNING["block"],
    )  # fmt: skip

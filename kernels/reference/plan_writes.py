"""Reference of :mod:`vllm_sparse.kernels.plan_writes`."""

from __future__ import annotations

import torch

from vllm_sparse.pages.write_plan import WritePlan


def plan_writes(slot_mapping: torch.Tensor, page_size: int, plan: WritePlan) -> None:
    slots = slot_mapping.long()
    written, block, row = slots >= 0, slots // page_size, slots % page_size
    marked = torch.where(written, block, -1)
    before = torch.cat([marked.new_full((1,), -2), marked[:-1]])
    after = torch.cat([marked[1:], marked.new_full((1,), -2)])
    starts, ends = written & (before != marked), written & (after != marked)
    staged = starts.cumsum(0) - 1
    plan.staged_slots[: len(slots)] = torch.where(written, staged * page_size + row, -1)
    count = int(starts.sum())
    plan.blocks[:count] = block[starts].int()
    plan.first_row[:count] = row[starts].int()
    plan.end_row[:count] = row[ends].int() + 1
    plan.num_pages.fill_(count)
    plan.clock += 1
    plan.num_misses.zero_()

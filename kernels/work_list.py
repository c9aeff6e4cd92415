"""The work list of a decode step, :attr:`vllm_sparse.pages.decode_plan.DecodePlan.work`, as programs share it.

Running totals say where the work of each row ends, so the row that a piece of work is of is the number of rows
that end at or before it. Most batches have no more rows than one load reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse.pages import decode_plan

COLUMNS: tl.constexpr = tl.constexpr(decode_plan.WORK_COLUMNS)
CHUNK_ENDS: tl.constexpr = tl.constexpr(3)
SEGMENT_ENDS: tl.constexpr = tl.constexpr(4)
"""Columns of the running totals of chunks and of segments."""
NOT_LISTED: tl.constexpr = tl.constexpr(decode_plan.NOT_LISTED)
AT_ONCE: tl.constexpr = tl.constexpr(128)
"""Entries read at a time."""


@triton.jit
def first_ends(work_ptr, num_reqs, COLUMN: tl.constexpr):
    """Where the first rows of the list end; load them before anything waits."""
    rows = tl.arange(0, AT_ONCE)
    return tl.load(work_ptr + rows * COLUMNS + COLUMN, mask=rows < num_reqs, other=NOT_LISTED)


@triton.jit
def chunks_of(program, totals_ptr):
    """First and last chunk of a program's share, the last one not among them."""
    total_chunks = tl.load(totals_ptr + 2)
    share = (total_chunks + tl.num_programs(0) - 1) // tl.num_programs(0)
    return program * share, tl.minimum(program * share + share, total_chunks)


@triton.jit
def row_of(number, ends, work_ptr, num_reqs, COLUMN: tl.constexpr):
    """The row that piece ``number`` of the work is of; ``ends``: what :func:`first_ends` gave."""
    rows = tl.arange(0, AT_ONCE)
    row = tl.sum((ends <= number).to(tl.int32))
    for base in range(AT_ONCE, num_reqs, AT_ONCE):
        ends = tl.load(work_ptr + (base + rows) * COLUMNS + COLUMN, mask=base + rows < num_reqs, other=NOT_LISTED)
        row += tl.sum((ends <= number).to(tl.int32))
    return row


@triton.jit
def entry_of(work_ptr, row):
    """Request of a row, its context tokens, and its first column in the scores."""
    entry = work_ptr + row * COLUMNS
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def begin_of(work_ptr, row, COLUMN: tl.constexpr):
    """Where the work of a row begins."""
    return tl.load(work_ptr + row * COLUMNS + COLUMN - COLUMNS, mask=row > 0, other=0)

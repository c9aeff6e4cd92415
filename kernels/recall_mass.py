"""recall_mass: the share of exact attention mass that the chosen pages of one row hold.

    share[h] = sum_{t in chosen} exp(scale * q[h] . K[t]) / sum_t exp(scale * q[h] . K[t])

Sums have a head's sink logit in them where it has one: what is lost of an output is what is lost of these.

Runs in every decode step and returns at once in most: the device's step counter says in which it reads
the keys of a sampled row, once all of them and once the chosen ones. The shares of a KV head's query
heads are averaged and added to the sums of the layer. Of a request with drafts it is the last token that is
measured, which attends to the whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.constants import PRECISION
from vllm_sparse.kernels.e4m3 import elements_of, stored
from vllm_sparse.kernels.logits import capped
from vllm_sparse.kernels.query_tokens import span_of
from vllm_sparse.kernels.work_list import entry_of
from vllm_sparse.pages import recall_sums
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.recall_sums import RecallSums

PARTS: tl.constexpr = tl.constexpr(recall_sums.PARTS)


@triton.jit
def _add_page(query, key_ptr, live, in_head, scale, soft_cap, top, total, CAPPED: tl.constexpr):
    """A page's keys at ``cells`` [dims, rows] added to a running sum of exponentials."""
    k = tl.load(key_ptr, mask=live[None, :] & in_head[:, None], other=0.0)
    logits = tl.dot(query, stored(k, query.dtype), input_precision=PRECISION) * scale
    if CAPPED:
        logits = capped(logits, soft_cap)
    logits = tl.where(live[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
    return new_top, total


@triton.jit
def _merged(tops, totals):
    """Log-sum-exp over the parts of each query head: [PARTS, GROUP_PAD] to [GROUP_PAD]; some part has a page."""
    peak = tl.max(tops, axis=0)
    return peak + tl.log(tl.sum(totals * tl.exp(tops - peak[None, :]), axis=0))


@triton.jit
def _added(a, b):
    """Log-sum-exp of two logarithms."""
    peak = tl.maximum(a, b)
    return peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))


@triton.jit(do_not_specialize=["every"])
def _recall_mass(
    q_ptr, starts_ptr, sinks_ptr, kv_ptr, block_table_ptr, head_pages_ptr, lengths_ptr, work_ptr, totals_ptr,
    step_ptr, sums_ptr, parts_ptr, arrivals_ptr, every, q_stride_token, q_stride_h, kv_stride_b, kv_stride_h,
    kv_stride_slot, head_page_stride, table_stride, table_stride_row, scale, soft_cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1)
    now, scored = tl.load(step_ptr), tl.load(totals_ptr)
    if (now % every != 0) | (scored == 0):
        return
    # The first rows of the work list are those with chosen pages.
    request, seq_len, _ = entry_of(work_ptr, now // every % scored)
    group, dims, rows = tl.arange(0, GROUP_PAD), tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    member, in_head = group < GROUP, dims < HEAD_DIM
    first, count = span_of(starts_ptr, request)
    token = (first + count - 1).to(tl.int64)
    query = tl.load(
        q_ptr + token * q_stride_token + (head * GROUP + group)[:, None] * q_stride_h + dims[None, :],
        mask=member[:, None] & in_head[None, :], other=0.0,
    )  # fmt: skip
    cells = rows[None, :] * kv_stride_slot + dims[:, None]
    top, total = tl.full([GROUP_PAD], float("-inf"), tl.float32), tl.zeros([GROUP_PAD], tl.float32)
    block_row = block_table_ptr + request.to(tl.int64) * table_stride
    for page in range(part, (seq_len + PAGE - 1) // PAGE, PARTS):
        block = tl.load(block_row + page).to(tl.int64)
        keys = kv_ptr + block * kv_stride_b + head.to(tl.int64) * kv_stride_h + cells
        top, total = _add_page(
            query, keys, page * PAGE + rows < seq_len, in_head, scale, soft_cap, top, total, CAPPED
        )
    row = request * KV_HEADS + head
    length = tl.load(lengths_ptr + row)
    table_row = head_pages_ptr + row.to(tl.int64) * table_stride_row
    some_top, some_total = tl.full([GROUP_PAD], float("-inf"), tl.float32), tl.zeros([GROUP_PAD], tl.float32)
    for place in range(part, (length + PAGE - 1) // PAGE, PARTS):
        keys = kv_ptr + tl.load(table_row + place).to(tl.int64) * head_page_stride + cells
        some_top, some_total = _add_page(
            query, keys, place * PAGE + rows < length, in_head, scale, soft_cap, some_top, some_total, CAPPED
        )
    mine = parts_ptr + (head * PARTS + part) * 4 * GROUP + group
    tl.store(mine, top, mask=member)
    tl.store(mine + GROUP, total, mask=member)
    tl.store(mine + 2 * GROUP, some_top, mask=member)
    tl.store(mine + 3 * GROUP, some_total, mask=member)
    # All threads' stores, then one arrival that publishes them: whoever comes last merges.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel")
    if arrived == PARTS - 1:
        tl.store(arrivals_ptr + head, 0)
        every_part = parts_ptr + (head * PARTS + tl.arange(0, PARTS))[:, None] * 4 * GROUP + group[None, :]
        mask = (group < GROUP)[None, :]
        # Volatile: other multiprocessors wrote these while this one ran.
        tops = tl.load(every_part, mask=mask, other=0.0, volatile=True)
        sizes = tl.load(every_part + GROUP, mask=mask, other=1.0, volatile=True)
        everything = _merged(tops, sizes)
        tops = tl.load(every_part + 2 * GROUP, mask=mask, other=0.0, volatile=True)
        sizes = tl.load(every_part + 3 * GROUP, mask=mask, other=1.0, volatile=True)
        chosen = _merged(tops, sizes)
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + head * GROUP + group, mask=member, other=0.0).to(tl.float32)
            everything, chosen = _added(everything, sinks), _added(chosen, sinks)
        share = tl.sum(tl.where(member, tl.exp(chosen - everything), 0.0), axis=0) / GROUP
        added = sums_ptr + head * 2
        tl.store(added, tl.load(added) + share.to(tl.float64))
        tl.store(added + 1, tl.load(added + 1) + 1.0)


def recall_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    table: PageTable,
    geometry: Geometry,
    monitor: RecallSums,
    layer: int,
) -> None:
    """Add one row's share to ``monitor.sums[layer]``, in steps whose number ``monitor.every`` divides.

    ``table`` holds what was selected from ``plan``; else as in
    :meth:`vllm_sparse.policies.base.DecodePolicy.score`. Reads ``2 * head_dim`` bytes (16-bit cache) per
    token of the row and KV head in a sampled step.
    """
    page_size, scale = geometry.page_size, geometry.scale
    q_heads, head_dim = q.shape[1:]
    kv_heads = kv.shape[1]
    group = q_heads // kv_heads
    assert q.stride(2) == kv.stride(3) == 1
    assert monitor.parts.shape == (kv_heads, PARTS.value, 4, group)
    _recall_mass[(PARTS.value, kv_heads)](
        q, plan.queries.starts, geometry.sink_logits, elements_of(kv), block_table, table.head_pages,
        table.lengths, plan.work, plan.totals, monitor.step, monitor.sums[layer], monitor.parts,
        monitor.arrivals, monitor.every, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2),
        HeadPageGrid.of(kv).stride, block_table.stride(0), table.head_pages.stride(0), scale, geometry.soft_cap,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size,
        CAPPED=geometry.soft_cap > 0,
    )  # fmt: skip

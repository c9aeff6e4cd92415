"""frozen_score: scores from the list of pages that a prompt left behind, the same in every step.

    age[p]   = last page - p
    recent   = min(pages after the list's, budget / 2)
    rank[p]  = age[p]                   of the newest ``recent`` pages
               recent + place of p      of listed pages
               count + age[p]           of all others
    score[p] = -rank[p] / 1024,  and with ``stop`` 32 less from rank ``budget`` on

Ranks are all different, and 65,536 of them keep their order through a softmax in float32. Without a list
all pages are ranked by age.

A list is in the summary row of the page that holds the last token of a chunk of prefill
(:mod:`vllm_sparse.freeze`), whose header names the page itself; page 0 counts as one that lists nothing.
Pages that decoding fills carry its number on: the step that writes the first token of a page copies it from
the page before, so nothing is searched. Only where that page knows of no list (a prompt whose last token alone
was not in the prefix cache) is the nearest one sought, page by page. Rows that are not scored carry on too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.launch import page_splits
from vllm_sparse.kernels.store_scores import store_chunk, store_scores

from vllm_sparse.decode_plan import DecodePlan
from vllm_sparse.page_scores import CHUNK_PAGES, PageScores
from vllm_sparse.summaries import FROZEN_HEADER

RANK_STEP = 2.0**-10
PAST_BUDGET = 32.0
NOWHERE = 65536


@triton.jit
def _headers(lists, block_row, pages, kv_stride_b):
    """What the headers of ``pages`` say, int32."""
    blocks = tl.load(block_row + pages).to(tl.int64)
    return tl.load(lists + blocks * kv_stride_b).to(tl.int32) & 0xFFFF


@triton.jit
def _frozen_score(
    lists, block_table, table_lens, dense_lens, score_offsets, values, chunk_lse,
    kv_stride_b, kv_stride_h, table_stride, score_stride, chunk_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr,
    HEADER: tl.constexpr, NOWHERE: tl.constexpr, STOP: tl.constexpr,
    RANK_STEP: tl.constexpr, PAST_BUDGET: tl.constexpr,
):  # fmt: skip
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(score_offsets + request)
    seq_len = tl.load(table_lens + request) + tl.load(dense_lens + request)
    if (seq_len == 0) | ((offset < 0) & (split > 0)):
        return
    block_row = block_table + request.to(tl.int64) * table_stride
    lists += head.to(tl.int64) * kv_stride_h
    last, row = (seq_len - 1) // PAGE, (seq_len - 1) % PAGE
    known = tl.maximum(tl.where(row == 0, last - 1, last), 0)
    anchor = tl.minimum(_headers(lists, block_row, known, kv_stride_b), known)
    is_list = (anchor == 0) | (_headers(lists, block_row, anchor, kv_stride_b) == anchor)
    sought = tl.where(is_list, -1, known)
    while sought >= 0:
        # Page 0 ends the search.
        pages = tl.maximum(sought - tl.arange(0, CHUNK), 0)
        found = (pages == 0) | (_headers(lists, block_row, pages, kv_stride_b) == pages)
        anchor = tl.max(tl.where(found, pages, -1), axis=0)
        sought = tl.where(anchor < 0, sought - CHUNK, -1)
    if (row == 0) & (split == 0) & (last > 0):
        block = tl.load(block_row + last).to(tl.int64)
        tl.store(lists + block * kv_stride_b, anchor.to(tl.int16))
    if offset < 0:
        return
    entry = lists + tl.load(block_row + anchor).to(tl.int64) * kv_stride_b
    count = tl.load(entry + 1).to(tl.int32) & 0xFFFF
    budget = tl.load(entry + 2).to(tl.int32) & 0xFFFF
    recent = tl.minimum(last - anchor, budget // 2)
    num_pages = last + 1
    group = tl.arange(0, GROUP_PAD)
    member = group < GROUP
    heads = head * GROUP + group
    for chunk in range(split, (num_pages + CHUNK - 1) // CHUNK, tl.num_programs(0)):
        pages = chunk * CHUNK + tl.arange(0, CHUNK)
        age = last - pages
        at = tl.full([CHUNK], NOWHERE, tl.int32)
        for first in range(0, count, CHUNK):
            place = first + tl.arange(0, CHUNK)
            listed = tl.load(entry + HEADER + place, mask=place < count, other=0).to(tl.int32) & 0xFFFF
            here = (listed[None, :] == pages[:, None]) & (place < count)[None, :]
            at = tl.minimum(at, tl.min(tl.where(here, place[None, :], NOWHERE), axis=1))
        rank = tl.where(at < NOWHERE, recent + at, count + age)
        rank = tl.where(age < recent, age, rank)
        score = rank.to(tl.float32) * -RANK_STEP
        if STOP:
            score = tl.where(rank >= budget, score - PAST_BUDGET, score)
        top, total = tl.full([GROUP_PAD], float("-inf"), tl.float32), tl.zeros([GROUP_PAD], tl.float32)
        block_of_scores = tl.zeros([GROUP_PAD, CHUNK], tl.float32) + score[None, :]
        top, total = store_scores(values, block_of_scores, heads, member, offset, pages, pages < num_pages,
                                  score_stride, top, total)  # fmt: skip
        store_chunk(chunk_lse, heads, member, offset, request, chunk, chunk_stride, top, total, CHUNK)


def frozen_score(
    kv: torch.Tensor,
    block_table: torch.Tensor,
    plan: DecodePlan,
    page_size: int,
    scores: PageScores,
    stop: bool = False,
) -> None:
    """Scores by rank, and the number of the list carried on to pages that begin.

    Args:
        kv: [num_blocks, kv_heads, page_size + 1, 2 * head_dim], its summaries ``frozen``.
        block_table: int32 [num_reqs, max_pages], at most 65,536 wide.
        plan: this step's routing; rows that are not scored only carry on.
        page_size: tokens per page.
        scores: where to write.
        stop: whether ranks past the list's budget count nothing, so that a coverage ends rows there.
    """
    num_reqs, max_pages = block_table.shape
    kv_heads, rows = kv.shape[1:3]
    group, words = scores.q_heads // kv_heads, kv.element_size() // 2
    assert rows > page_size and kv.stride(3) == 1, "the pages of this cache have no room for frozen"
    splits = page_splits(num_reqs * kv_heads, max_pages, CHUNK_PAGES, kv.device)
    _frozen_score[(splits, kv_heads, num_reqs)](
        kv.view(torch.int16)[:, :, page_size], block_table, plan.table_seq_lens, plan.dense_seq_lens,
        plan.score_offsets, scores.values, scores.chunk_lse,
        kv.stride(0) * words, kv.stride(1) * words, block_table.stride(0),
        scores.values.stride(0), scores.chunk_lse.stride(0),
        GROUP=group, GROUP_PAD=triton.next_power_of_2(group), PAGE=page_size, CHUNK=CHUNK_PAGES,
        HEADER=FROZEN_HEADER, NOWHERE=NOWHERE, STOP=stop, RANK_STEP=RANK_STEP,
        PAST_BUDGET=PAST_BUDGET, num_warps=4,
    )  # fmt: skip

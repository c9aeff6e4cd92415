"""Sketches of keys: their kernels against the torch twins, and what they must hold."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES, error, make, poisoned_scores
from vllm_sparse.kernels import reference

from vllm_sparse.summaries import SKETCH_BITS, summary_rows

pytest.importorskip("triton")
from vllm_sparse.kernels import launchers

# (kv_heads, group, head_dim, page_size)
SHAPES = [(2, 3, 64, 16), (1, 1, 128, 16), (3, 4, 96, 32), (1, 7, 256, 16), (2, 8, 32, 64)]
LENGTHS = [1, 0, 15, 16, 17, 33, 200, 389]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_group{}_d{}_page{}".format(*shape))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
summaries = pytest.mark.parametrize("summary", SKETCH_BITS)


def case_of(shape, dtype, summary, lengths=LENGTHS):
    kv_heads, group, head_dim, page_size = shape
    return make(lengths, kv_heads, group, head_dim, page_size, 4, dtype=dtype, summary=summary)


def empty_cache(blocks, kv_heads, head_dim, page_size, dtype, summary):
    rows = page_size + summary_rows(summary, page_size, head_dim, dtype.itemsize)
    return torch.full((blocks, kv_heads, rows, 2 * head_dim), float("nan"), dtype=dtype, device=DEVICE)


@summaries
@shapes
@dtypes
def test_scores_match_twin(shape, dtype, summary):
    case = case_of(shape, dtype, summary, [*LENGTHS, 130 * shape[3]])
    q_heads, capacity = case.scores.values.shape
    actual = poisoned_scores(q_heads, capacity, len(case.seq_lens), DEVICE)
    for run, scores in ((reference.sketch_score, case.scores), (launchers.sketch_score, actual)):
        run(case.q, case.kv, case.block_table, case.plan, case.page_size, case.scale, scores, summary)
    for mine, twin in ((actual.values, case.scores.values), (actual.chunk_lse, case.scores.chunk_lse)):
        assert torch.equal(mine.isnan(), twin.isnan()), "wrote a score that nobody asked for"
        written = ~mine.isnan()
        assert written.any()
        # A query is rounded to 14 bits.
        assert error(mine[written], twin[written]) < 1e-4

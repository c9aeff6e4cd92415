"""Reference of :mod:`vllm_sparse.kernels.stage_pages`."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.reference.e4m3 import kept
from vllm_sparse.pages.write_plan import WritePlan


def stage_pages(
    host: torch.Tensor,
    summaries: torch.Tensor,
    plan: WritePlan,
    num_tokens: int,
    hot: torch.Tensor,
    exponents: torch.Tensor | None = None,
) -> None:
    for page, block, first, _ in staged_pages(plan):
        hot[page, :, :first] = kept(host, exponents, block, hot.dtype)[:, :first]
        if first:
            hot[page, :, host.shape[2] :] = summaries[block]


def staged_pages(plan: WritePlan):
    """Yield (staged page, block, first row, end row)."""
    count = int(plan.num_pages)
    columns = (plan.blocks, plan.first_row, plan.end_row)
    yield from zip(range(count), *(column[:count].tolist() for column in columns), strict=True)

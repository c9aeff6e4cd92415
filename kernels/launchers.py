"""All Triton launchers under one name; needs Triton (see :func:`vllm_sparse.kernels.for_device`)."""

from vllm_sparse.kernels.index_score import random_score, recency_score
from vllm_sparse.kernels.page_mass import page_mass
from vllm_sparse.kernels.page_write import page_write
from vllm_sparse.kernels.plan_decode import plan_decode
from vllm_sparse.kernels.quest_score import quest_score
from vllm_sparse.kernels.select_pages import select_pages
from vllm_sparse.kernels.sparse_decode import sparse_decode

__all__ = [
    "page_mass",
    "page_write",
    "plan_decode",
    "quest_score",
    "random_score",
    "recency_score",
    "select_pages",
    "sparse_decode",
]

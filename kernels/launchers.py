"""All Triton launchers under one name; needs Triton (see :func:`vllm_sparse.kernels.for_device`)."""

from vllm_sparse.kernels.antidiagonal_score import antidiagonal_score
from vllm_sparse.kernels.code_queries import code_queries
from vllm_sparse.kernels.fetch_head_pages import fetch_head_pages
from vllm_sparse.kernels.find_hot_slots import find_hot_slots
from vllm_sparse.kernels.index_score import random_score, recency_score
from vllm_sparse.kernels.page_mass import page_mass
from vllm_sparse.kernels.page_write import page_write
from vllm_sparse.kernels.pattern_distance import pattern_distance
from vllm_sparse.kernels.plan_decode import plan_decode
from vllm_sparse.kernels.plan_writes import plan_writes
from vllm_sparse.kernels.pooled_score import pooled_score
from vllm_sparse.kernels.position_pattern import position_pattern
from vllm_sparse.kernels.prefill_table import prefill_table
from vllm_sparse.kernels.probe_mass import probe_mass
from vllm_sparse.kernels.range_score import range_score
from vllm_sparse.kernels.read_pages import read_pages
from vllm_sparse.kernels.recall_mass import recall_mass
from vllm_sparse.kernels.sample_mass import sample_mass
from vllm_sparse.kernels.select_bands import select_bands
from vllm_sparse.kernels.select_pages import select_pages
from vllm_sparse.kernels.select_row_pages import select_row_pages
from vllm_sparse.kernels.sketch_score import sketch_score
from vllm_sparse.kernels.sparse_decode import sparse_decode
from vllm_sparse.kernels.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.stage_pages import stage_pages
from vllm_sparse.kernels.vertical_slash import vertical_slash
from vllm_sparse.kernels.write_through import write_through

__all__ = [
    "antidiagonal_score",
    "code_queries",
    "fetch_head_pages",
    "find_hot_slots",
    "page_mass",
    "page_write",
    "pattern_distance",
    "plan_decode",
    "plan_writes",
    "pooled_score",
    "position_pattern",
    "prefill_table",
    "probe_mass",
    "random_score",
    "range_score",
    "read_pages",
    "recall_mass",
    "recency_score",
    "sample_mass",
    "select_bands",
    "select_pages",
    "select_row_pages",
    "sketch_score",
    "sparse_decode",
    "sparse_prefill",
    "stage_pages",
    "vertical_slash",
    "write_through",
]

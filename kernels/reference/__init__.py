"""Plain-torch references of every kernel launcher, with the same names and signatures.

They run the CPU backend and are what GPU kernels are tested against, so they favour plain code over speed. Each
lies in a file named as its kernel's; the docstring of the launcher there describes the arguments of both.
``dense_attention`` has no kernel; ``key_range`` and ``sketched_keys`` read back what ``page_write`` stores.
"""

from vllm_sparse.kernels.reference.antidiagonal_score import antidiagonal_score
from vllm_sparse.kernels.reference.code_queries import code_queries
from vllm_sparse.kernels.reference.dense_attention import dense_attention
from vllm_sparse.kernels.reference.fetch_head_pages import fetch_head_pages
from vllm_sparse.kernels.reference.find_hot_slots import find_hot_slots
from vllm_sparse.kernels.reference.index_score import random_score, recency_score
from vllm_sparse.kernels.reference.page_mass import page_mass
from vllm_sparse.kernels.reference.page_write import key_range, page_write
from vllm_sparse.kernels.reference.pattern_distance import pattern_distance
from vllm_sparse.kernels.reference.plan_decode import plan_decode
from vllm_sparse.kernels.reference.plan_writes import plan_writes
from vllm_sparse.kernels.reference.pooled_score import pooled_score
from vllm_sparse.kernels.reference.position_pattern import position_pattern
from vllm_sparse.kernels.reference.prefill_table import prefill_table
from vllm_sparse.kernels.reference.probe_mass import probe_mass
from vllm_sparse.kernels.reference.range_score import range_score
from vllm_sparse.kernels.reference.read_pages import read_pages
from vllm_sparse.kernels.reference.recall_mass import recall_mass
from vllm_sparse.kernels.reference.sample_mass import sample_mass
from vllm_sparse.kernels.reference.select_bands import select_bands
from vllm_sparse.kernels.reference.select_pages import select_pages
from vllm_sparse.kernels.reference.select_row_pages import select_row_pages
from vllm_sparse.kernels.reference.sketch_score import sketch_score
from vllm_sparse.kernels.reference.sketch_write import sketched_keys
from vllm_sparse.kernels.reference.sparse_decode import sparse_decode
from vllm_sparse.kernels.reference.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.reference.stage_pages import stage_pages
from vllm_sparse.kernels.reference.vertical_slash import vertical_slash
from vllm_sparse.kernels.reference.write_through import write_through

__all__ = [
    "antidiagonal_score",
    "code_queries",
    "dense_attention",
    "fetch_head_pages",
    "find_hot_slots",
    "key_range",
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
    "sketched_keys",
    "sparse_decode",
    "sparse_prefill",
    "stage_pages",
    "vertical_slash",
    "write_through",
]

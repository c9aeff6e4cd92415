"""Every attention kernel against the torch reference in float64; those for GPUs are skipped without one."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, ON_GPU, TOLERANCE, error, in_float64, make, random_scores, select_reference

from vllm_sparse.attention import ATTENTION_KERNELS, choose_kernel
from vllm_sparse.attention.base import AttentionShape
from vllm_sparse.attention.registry import kernel_class
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.selection import Selection

SHAPES = [(8, 4, 128, 16), (3, 3, 64, 16), (2, 7, 128, 32), (1, 1, 256, 64), (1, 2, 512, 16), (4, 8, 96, 16)]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LENGTHS = [1, 0, 16, 17, 700, 389, 2111]


def case_of(shape, name="torch"):
    kv_heads, group, head_dim, page_size = shape
    padding = {"padding": 0} if name == "xformers" else {}  # the one that refuses padded blocks
    case = make(LENGTHS, kv_heads, group, head_dim, page_size, 8, dtype=DTYPE, **padding)
    random_scores(case)
    select_reference(case)
    return case


def kernel_for(name, case):
    shape = AttentionShape(DEVICE, DTYPE, case.geometry, DTYPE)
    reason = kernel_class(name).unsupported(shape)
    if reason is not None:
        pytest.skip(reason)
    return kernel_class(name)()


@pytest.mark.parametrize("name", ATTENTION_KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "kv{}_group{}_d{}_page{}".format(*shape))
def test_kernel_agrees_with_the_torch_reference(name, shape):
    case = case_of(shape, name)
    kernel = kernel_for(name, case)
    assert kernel.unreadable(case.kv, case.page_size) is None
    exact = torch.zeros_like(case.q, dtype=torch.float64)
    reference.sparse_decode(case.q.double(), in_float64(case.kv), case.table, case.geometry, exact)
    out = torch.full_like(case.q, 7.0)
    kernel.attend(case.q, case.kv, case.table, case.geometry, out)
    attended = case.plan.table_seq_lens > 0
    assert error(out[attended], exact[attended]) < TOLERANCE[DTYPE]
    assert (out[~attended] == 7.0).all(), "a row of length 0 was written"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", [name for name in ATTENTION_KERNELS if name != "torch"])
def test_kernel_replays_in_a_cuda_graph_with_other_pages(name):
    first, second = case_of(SHAPES[0], name), case_of(SHAPES[0], name)
    kernel = kernel_for(name, first)
    out = torch.zeros_like(first.q)

    def attend():
        kernel.attend(first.q, first.kv, first.table, first.geometry, out)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for mine, other in ((first.q, second.q), (first.kv, second.kv)):
        mine[: len(other)].copy_(other[: len(mine)])
    first.table.head_pages.copy_(second.table.head_pages)
    first.table.lengths.copy_(second.table.lengths)
    graph.replay()
    expected = torch.zeros_like(first.q)
    reference.sparse_decode(second.q, second.kv, second.table, second.geometry, expected)
    attended = second.plan.table_seq_lens > 0
    assert error(out[attended], expected[attended]) < TOLERANCE[DTYPE]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="synchronisation is a matter of GPUs")
@pytest.mark.parametrize("policy", ["quest", "streaming", "oracle", "random"])
@pytest.mark.parametrize("name", [name for name in ATTENTION_KERNELS if name != "torch"])
def test_a_decode_step_never_waits_for_the_gpu(policy, name):
    from vllm_sparse.kernels import launchers
    from vllm_sparse.policies import DECODE_POLICIES

    case = case_of(SHAPES[0], name)
    kernel, chooser = kernel_for(name, case), DECODE_POLICIES[policy]

    def step():
        launchers.plan_decode(
            case.seq_lens, case.plan, case.table, Selection(16, 8, 1, 20), 0, case.scores.capacity_pages, False
        )
        chooser.score(case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
        launchers.select_pages(
            case.scores, case.block_table, case.plan, case.kv, Selection(16, 8, 1, 20), case.table
        )
        kernel.attend(case.q, case.kv, case.table, case.geometry, case.q.clone())

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")
def test_a_kernel_that_cannot_run_is_refused_with_the_reason_and_what_can():
    shape = AttentionShape(DEVICE, DTYPE, Geometry(4, 2, 64, 16, 0.1), DTYPE)
    with pytest.raises(
        ConfigError, match=r"sparse.attention_kernel: 'fa3' cannot run here.*GPU.*Allowed here: auto, torch"
    ):
        choose_kernel("fa3", shape)
    assert type(choose_kernel("auto", shape)).__name__ == "TorchAttention"

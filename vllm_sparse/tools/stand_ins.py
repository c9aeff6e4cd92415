"""What stands in for parts of an engine while :mod:`vllm_sparse.tools.dry_engine` builds layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

GROUPS = {"_TP": "tensor", "_PP": "pipeline", "_DP": "data", "_EP": "expert"}
"""vLLM's groups of ranks, and which of :func:`_sizes` they have; all others are of one rank."""
OTHER_GROUPS = ("_WORLD", "_ETP", "_ENGRAM_DP", "_DCP", "_EPLB", "_PCP")


def _sizes(parallel: Any) -> dict[str, int]:
    """Ranks of each group that has more than one."""
    tensor, data = parallel.tensor_parallel_size, parallel.data_parallel_size
    return {"tensor": tensor, "pipeline": parallel.pipeline_parallel_size, "data": data, "expert": tensor * data}


@contextmanager
def rotary_embeddings_apart() -> Iterator[None]:
    """Keep those of the meta device, which vLLM shares among all models of a process, from engines that run."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    shared = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(shared)


@contextmanager
def ranks(parallel: Any, stage: int) -> Iterator[None]:
    """vLLM's groups of ranks as rank 0 of pipeline stage ``stage`` sees them, none of which can be talked to."""
    from torch.distributed import ProcessGroup
    from vllm.distributed import parallel_state

    def group(name: str, size: int, rank: int) -> Any:
        made = object.__new__(parallel_state.GroupCoordinator)
        vars(made).update(
            unique_name=name, ranks=list(range(size)), world_size=size, rank=rank, rank_in_group=rank,
            local_rank=rank, device=torch.device("meta"), cpu_group=ProcessGroup(rank, size),
            device_group=ProcessGroup(rank, size),
            device_communicator=None, mq_broadcaster=None, use_device_communicator=False, use_custom_op_call=False,
        )  # fmt: skip
        return made

    sizes = _sizes(parallel)
    groups = {name: group(name, sizes[of], stage if name == "_PP" else 0) for name, of in GROUPS.items()}
    groups |= {name: group(name, 1, 0) for name in OTHER_GROUPS if hasattr(parallel_state, name)}
    with _replaced(parallel_state, **groups):
        yield


@contextmanager
def without_buffers() -> Iterator[None]:
    """Layers of ours that allocate nothing, on a device that may be full.

    What is read off a tensor's numbers, as of ALiBi slopes, is zeros.
    """
    from vllm_sparse.backend.impl import SparseImpl

    def of_zeros(read: Callable) -> Callable:
        return lambda tensor: read(torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor)

    reads = {name: of_zeros(getattr(torch.Tensor, name)) for name in ("tolist", "item")}
    with _replaced(SparseImpl, settle=lambda *_: None), _replaced(torch.Tensor, **reads):
        yield


@contextmanager
def caches_of_a_gpu() -> Iterator[None]:
    """Layers that run as in stock have the blocks of a GPU, where a CPU's begin at 32 tokens, and may have caches
    in dtypes that this CPU's attention does not read."""
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with _replaced(
        CPUAttentionBackend,
        supports_kv_cache_dtype=lambda dtype: True,
        get_supported_kernel_block_sizes=lambda kv_cache_spec=None: [MultipleOf(16)],
    ):
        yield


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)

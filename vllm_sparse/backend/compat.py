"""Everything that may differ between releases of vLLM. A leaf: imports nothing of this package."""

from __future__ import annotations

import functools
import inspect
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

NAME = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.backend.SparseBackend"
TESTED = ((0, 31), (0, 33))
"""The newest release and the two before it."""
TARGET_TAGS = ("backbone", "self_decoder", "cross_decoder")
"""How vLLM tags the parts of a model while it builds them; a tag that is not known is taken for a draft's."""

logger = logging.getLogger("vllm.vllm_sparse")
"""A child of vLLM's logger, so our lines take its format and level."""


@functools.cache
def log_once(level: int, text: str) -> None:
    """Log ``text`` once, and not in each of an engine's processes as well."""
    if multiprocessing.parent_process() is None:
        logger.log(level, text)


def check_version() -> None:
    """Warn of a vLLM that is newer than what is tested.

    Raises:
        RuntimeError: it is older.
    """
    import vllm

    release = getattr(vllm, "__version_tuple__", (0, 0))[:2]
    if release < (0, 2) or TESTED[0] <= release <= TESTED[1]:  # builds from source may know no release
        return
    served = f"{TESTED[0][0]}.{TESTED[0][1]} to {TESTED[1][0]}.{TESTED[1][1]}"
    if release < TESTED[0]:
        raise RuntimeError(f"this is vLLM {vllm.__version__}, and vllm-sparse serves {served}")
    log_once(logging.WARNING, f"vllm-sparse is tested with vLLM {served}; this is {vllm.__version__}")


def register_backend() -> Any:
    """``AttentionBackendEnum.SPARSE``, new to an enumeration that does not have it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if hasattr(AttentionBackendEnum, "register"):
        return AttentionBackendEnum.register(NAME, BACKEND_PATH)
    member = object.__new__(AttentionBackendEnum)  # 0.31
    member._name_, member._value_ = NAME, BACKEND_PATH
    AttentionBackendEnum._member_map_[NAME] = member
    AttentionBackendEnum._value2member_map_[BACKEND_PATH] = member
    AttentionBackendEnum._member_names_.append(NAME)
    return member


def asks_for_sparse(vllm_config) -> bool:
    """Whether an engine's config names this backend for any of its layers, those of drafts included."""
    attention = getattr(vllm_config, "attention_config", None)
    chosen = [getattr(attention, "backend", None), *(getattr(attention, "backend_per_kind", None) or {}).values()]
    chosen.append(getattr(getattr(vllm_config, "speculative_config", None), "attention_backend", None))
    return any(getattr(backend, "name", None) == NAME for backend in chosen)


def builds_a_draft() -> bool:
    """Whether the layers that vLLM builds now are those of a draft model or head."""
    from vllm.compilation import backends

    return backends.model_tag not in TARGET_TAGS


def kv_dtype(vllm_config) -> str:
    """Dtype of the KV cache, as vLLM names it."""
    return resolved_kv_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)


def resolved_kv_dtype(asked: str, model_config) -> str:
    """Dtype of the KV cache of an engine that is asked for ``asked``, which vLLM has resolved as far as it does
    before it builds layers."""
    if asked != "auto":
        return asked
    if kv_cache_scheme(model_config):
        return "fp8"  # as vLLM finds out where it builds layers, perhaps in other processes
    return str(model_config.dtype).removeprefix("torch.")


def kv_cache_scheme(model_config) -> dict | None:
    """How a checkpoint of compressed-tensors has quantised K and V; what others say is in ``cache_dtype``."""
    model = getattr(model_config, "hf_config", None)
    for config in (model, getattr(model, "text_config", None)):
        found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
        if isinstance(found, dict) and found.get("quant_method") == "compressed-tensors":
            return found.get("kv_cache_scheme")
    return None


def check_kv_cache_scheme(model_config) -> None:
    """Raise what vLLM does where it builds layers with a ``kv_cache_scheme`` that it does not know."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )

    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(kv_cache_scheme(model_config))


def fit_blocks_to_dtypes(vllm_config) -> None:
    """Size blocks so that layers of several KV dtypes share them, which vLLM does on GPUs alone."""
    from vllm.platforms import current_platform

    backends = current_platform._find_non_ssm_backends(vllm_config)
    if backends:
        current_platform._align_heterogeneous_kv_block_size(vllm_config, backends[0])


def head_major_layouts() -> tuple:
    """``supported_kv_cache_layouts``: block, head, row; layers inside or outside of blocks."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


def metadata_call(runner) -> tuple[Any, str, Callable]:
    """Where a model runner builds a step's attention metadata: the owner and the name of a method, and what gives,
    for the arguments of a call, the ids of the requests of the step's rows, in their order, none in dummy runs,
    and an array that says which of the rows are prompt tokens, None where ``is_prefilling`` does."""
    if hasattr(runner, "model_state"):  # Model Runner V2; dummy runs have made-up ids
        # In hybrid models ``is_prefilling`` leaves out lone prompt tokens, which states take as decode rows.
        return runner.model_state, "prepare_attn", lambda batch, *_, **__: (batch.req_ids, batch.is_prefilling_np)

    def rows_of(*_, num_scheduled_tokens=None, **__):
        return runner.input_batch.req_ids if num_scheduled_tokens else (), None

    return runner, "_build_attention_metadata", rows_of


def customised(backend: Any, spec: Any) -> Any:
    """``spec`` as a backend changes it, where vLLM's runners collect the specs of all layers."""
    from vllm.v1.worker import utils

    customise = getattr(utils, "customize_attention_spec", None)
    return backend.customize_spec(spec) if customise is None else customise(backend, spec)  # 0.31


def kv_cache_planning() -> Any:
    """The module in which vLLM shares out memory among layers."""
    from importlib import import_module

    try:
        return import_module("vllm.v1.core.kv_cache_planning")
    except ModuleNotFoundError:  # before 0.33
        return import_module("vllm.v1.core.kv_cache_utils")


def state_bytes(vllm_config) -> int:
    """Bytes of a layer's state in a hybrid model: the largest, as vLLM sizes blocks."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    model_config = vllm_config.model_config
    model, _ = ModelRegistry.resolve_model_cls(model_config.architecture, model_config=model_config)
    if hasattr(model, "get_mamba_specs_from_config"):  # 0.33
        return max(spec.page_size_bytes for spec in model.get_mamba_specs_from_config(vllm_config))
    shapes = model.get_mamba_state_shape_from_config(vllm_config)
    dtypes = model.get_mamba_state_dtype_from_config(vllm_config)
    return MambaSpec(shapes=shapes, dtypes=dtypes, block_size=-1).page_size_bytes


def pool_block_bytes(vllm_config, groups: list) -> int:
    """GPU bytes of one block of the pool that ``groups`` of layers share."""
    function = kv_cache_planning()._pool_bytes_per_block
    named = "vllm_config" in inspect.signature(function).parameters
    return function(vllm_config, groups) if named else function(groups)  # 0.31


def zero_no_blocks(runner) -> None:
    """Have a model runner hand out blocks as they are; of hybrid models vLLM zeroes them."""
    zeroer = getattr(runner, "kv_block_zeroer", None)  # Model Runner V2
    if zeroer is not None:
        zeroer.zero_block_ids = lambda block_ids: None
    else:
        runner._zero_block_ids = lambda block_ids: None


def replace_rows(common, **rows):
    """A copy of vLLM's common metadata for other rows, without what it derived from the old ones."""
    derived = (
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        "seq_lens_cpu_upper_bound",
        "is_prefilling",
    )
    return common.replace(**{name: None for name in derived if hasattr(common, name)}, **rows)

"""What we take from vLLM by name: classes, methods, arguments and fields, on every supported release."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm
from tiny_engine import engine_core
from vllm.config import AttentionConfig, ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

from vllm_sparse.backend import describe, hooks
from vllm_sparse.backend.backend import SparseBackend
from vllm_sparse.backend.builder import SparseMetadataBuilder
from vllm_sparse.backend.impl import SparseImpl
from vllm_sparse.backend.spec import SparseAttentionSpec
from vllm_sparse.plugin_entrypoints import register

pytestmark = pytest.mark.seam

BACKEND = Path(inspect.getfile(SparseBackend)).parent
OURS = {
    SparseBackend: AttentionBackend,
    SparseMetadataBuilder: AttentionMetadataBuilder,
    SparseImpl: AttentionImpl,
    SparseAttentionSpec: FullAttentionSpec,
}


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(function, "__func__", function)).parameters)


@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
def test_our_methods_take_what_vllm_gives_theirs(ours):
    compared = []
    for name, member in vars(ours).items():
        theirs = inspect.getattr_static(OURS[ours], name, None)
        if name == "__init__" or not (callable(member) or hasattr(member, "__func__")) or theirs is None:
            continue
        mine, given = parameters(member), parameters(theirs)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values()):
            continue
        compared.append(name)
        assert set(given) - {"self", "cls"} <= set(mine), f"{ours.__name__}.{name} does not take all arguments"
        needed = {name for name, parameter in mine.items() if parameter.default is parameter.empty}
        assert needed - {"self", "cls"} <= set(given), f"{ours.__name__}.{name} wants more than it is given"
    assert compared, "nothing was compared"


def test_hooks_stand_before_functions_that_vllm_has():
    register()
    platform = type(current_platform)
    for name in ("get_attn_backend_cls", "check_and_update_config"):
        assert vars(platform)[name].__func__._vllm_sparse
    chosen_by = parameters(vars(platform)["get_attn_backend_cls"])
    assert list(chosen_by) == ["cls", "selected_backend", "attn_selector_config", "num_heads"]
    hooks.install()
    assert hooks.installed() and callable(WorkerBase.sparse_metrics)
    # What the wrappers call in turn.
    wrapped = {
        "determine_available_memory",
        "initialize_from_config",
        "compile_or_warm_up_model",
        "sleep",
        "wake_up",
        "reload_weights",
        "finish_weight_update",
    }
    assert wrapped <= set(dir(Worker))
    assert "initialize_from_config" in vars(WorkerWrapperBase)
    assert hasattr(AttentionBackend, "customize_spec"), "the spec is adjusted where vLLM asks for it"


def test_a_layer_is_built_with_the_arguments_that_decide_about_it():
    given = set(parameters(inspect.unwrap(Attention.__init__)))
    sources = "".join(Path(inspect.getfile(module)).read_text() for module in (describe, hooks))
    asked = set(re.findall(r'arguments\["(\w+)"\]', sources))
    assert len(asked) > 10 and asked <= given
    assert {"backend", "backend_per_kind", "use_non_causal"} <= set(AttentionConfig.__dataclass_fields__)
    assert {"is_hybrid", "is_encoder_decoder", "is_mm_prefix_lm", "rswa_window"} <= set(dir(ModelConfig))


def test_fields_of_a_step_that_we_read_exist():
    sources = "".join(path.read_text() for path in BACKEND.glob("*.py"))
    read = set(re.findall(r"\bcommon\.(\w+)", sources)) - {"replace"}
    assert len(read) >= 8, "the sources have another name for vLLM's metadata of a step"
    fields = set(CommonAttentionMetadata.__dataclass_fields__)
    assert read - fields <= set(dir(CommonAttentionMetadata)), "read from a step, but not there"
    assert hasattr(CommonAttentionMetadata, "replace")


def test_a_step_splits_into_decodes_of_one_token_and_prefills():
    given = parameters(split_decodes_and_prefills)
    assert next(iter(given)) == "common_attn_metadata" and given["decode_threshold"].default == 1


def test_dense_rows_call_stock_backends_as_they_want_it():
    """Backends of GPUs import on a CPU; what they compute is for GPU tests."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    for backend in (FlashAttentionBackend, TritonAttentionBackend):
        builder, impl = backend.get_builder_cls(), backend.get_impl_cls()
        assert list(parameters(builder.__init__))[1:5] == ["kv_cache_spec", "layer_names", "vllm_config", "device"]
        assert list(parameters(builder.build))[1:4] == ["common_prefix_len", "common_attn_metadata", "fast_build"]
        assert list(parameters(impl.forward))[1:8] == [
            "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
        ]  # fmt: skip


@pytest.mark.engine
def test_the_newest_release_runs_model_runner_v2(tiny):
    """As it does on GPUs; else its seams would be tested against a runner that it calls deprecated."""
    with tiny.start() as llm:
        executor = engine_core(llm).model_executor
        runner = executor.driver_worker.worker.model_runner
    modules = {cls.__module__ for cls in type(runner).__mro__}
    assert ("vllm.v1.worker.gpu.model_runner" in modules) == (vllm.__version_tuple__[:2] >= (0, 33))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [({}, True), ({"language_model_only": True}, False), ({"limit_per_prompt": {"image": 0}}, True),
     ({"limit_per_prompt": {"image": 0, "video": 0}}, False)],
)  # fmt: skip
def test_which_engines_take_images(settings, taken):
    """One that takes none has no prefix whose tokens attend to later ones."""
    from types import SimpleNamespace

    from vllm.config.multimodal import MultiModalConfig

    from vllm_sparse.backend.describe import _takes_images

    assert _takes_images(SimpleNamespace(multimodal_config=MultiModalConfig(**settings))) is taken
    assert _takes_images(SimpleNamespace(multimodal_config=None))

"""Settings under which vLLM's engine runs fast and in-process on a small CPU, and seeds that can be repeated."""

import os
import random
import secrets
import sys
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

CPU_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in CPU_ENGINE.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("VLLM_SPARSE_CONFIG", None)
# Last: what is installed comes first. The root has ``benchmarks``, also for who starts pytest elsewhere.
sys.path += [str(Path(__file__).parent / "stand_ins"), str(Path(__file__).parent.parent)]

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton kernels are tested in its interpreter; it must be chosen before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser) -> None:
    parser.addoption("--seed", type=int, help="whole number of an earlier run, whose random numbers to repeat")


def pytest_configure(config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbits(31)
    _hasten_interpreter()


def pytest_report_header(config) -> str:
    return f"seed: {config.option.seed}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Seed each test for itself, so that it draws the same numbers alone as among others."""
    seed = zlib.crc32(f"{item.config.option.seed} {item.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed:
        repeat = f"pytest --seed {item.config.option.seed} '{item.nodeid}'"
        report.sections.append(("to repeat these random numbers", repeat))


def _hasten_interpreter() -> None:
    """Halve the time of Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    # Else each integer operation runs again in int64, to report overflows; the references compute in int64 anyway.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Engines of tiny models; see :mod:`tiny_engine`."""
    if torch.cuda.is_available():
        pytest.skip("compares with vLLM's CPU backend")
    pytest.importorskip("vllm")
    from tiny_engine import TinyEngines

    from vllm_sparse.plugin_entrypoints import register

    register()
    engines = TinyEngines(tmp_path_factory.mktemp("models"))
    yield engines
    engines.close()


@pytest.fixture
def codable(monkeypatch):
    """K and V are rounded to eighths up to 15/8 before they are cached: e4m3 holds these exactly."""
    from vllm_sparse.backend.impl import SparseImpl

    update = SparseImpl.do_kv_cache_update

    def rounded(self, layer, key, value, kv_cache, slot_mapping):
        key, value = (torch.round(8 * x).clamp(-15, 15) / 8 for x in (key, value))
        update(self, layer, key, value, kv_cache, slot_mapping)

    monkeypatch.setattr(SparseImpl, "do_kv_cache_update", rounded)


@pytest.fixture(autouse=True)
def gpu_memory_for_others():
    """What torch keeps of a large test would be missing where drivers load kernels and map host memory."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

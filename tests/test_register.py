"""register() never stops a vLLM that was not asked for sparse, whatever breaks; who asks for it is told why."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from test_plugin import run_python

BREAKS = """
import logging, sys, types
sys.path.insert(0, "tests")
import conftest

warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logger = logging.getLogger("vllm.vllm_sparse")
logger.addHandler(Keep(logging.WARNING))

import copyreg
import vllm.platforms
from vllm.config import AttentionConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_sparse import plugin_entrypoints
from vllm_sparse.backend import compat, install
from vllm_sparse.plugin_entrypoints import register

platform = type(current_platform)

def state():
    hooks = [vars(platform).get(name) for name in ("get_attn_backend_cls", "check_and_update_config")]
    values = dict(AttentionBackendEnum._value2member_map_)
    enums = [list(AttentionBackendEnum), values, "SPARSE" in vars(AttentionBackendEnum)]
    return [*hooks, *enums, copyreg.dispatch_table.get(AttentionBackendEnum)]

class Patch:
    def __init__(self, place, name, value):
        self.place, self.name, self.value = place, name, value
    def __enter__(self):
        self.before = vars(self.place).get(self.name)
        setattr(self.place, self.name, self.value)
    def __exit__(self, *_):
        setattr(self.place, self.name, self.before) if self.before is not None else delattr(self.place, self.name)

class Module:
    def __init__(self, name, value):
        self.name, self.value = name, value
    def __enter__(self):
        self.before = sys.modules.get(self.name)
        sys.modules[self.name] = self.value
    def __exit__(self, *_):
        sys.modules[self.name] = self.before

class Bare:
    pass

class Half:
    @classmethod
    def get_attn_backend_cls(cls, selected_backend):
        return "stock"

class Static(Half):
    @staticmethod
    def check_and_update_config(config):
        pass

def fails(*args):
    raise RuntimeError("not in this vLLM")

half = vars(Half)["get_attn_backend_cls"]
breaks = {
    "no platforms": Module("vllm.platforms", types.ModuleType("vllm.platforms")),
    "no module of ours": Module("vllm_sparse.backend.install", None),
    "too old": Patch(sys.modules["vllm"], "__version_tuple__", (0, 26, 0)),
    "no choice": Patch(vllm.platforms, "current_platform", Bare()),
    "no check": Patch(vllm.platforms, "current_platform", Half()),
    "static check": Patch(vllm.platforms, "current_platform", Static()),
    "no name": Patch(install, "add_backend_name", fails),
    "no registry": Module("vllm.v1.attention.backends.registry", types.ModuleType("registry")),
}
stock = state()
for name, broken in breaks.items():
    warnings.clear()
    plugin_entrypoints._reasons.clear()
    if name == "no module of ours":
        import vllm_sparse.backend
        del vllm_sparse.backend.install
    with broken:
        register()
        register()
    if name == "no module of ours":
        vllm_sparse.backend.install = install
    assert len(warnings) == 1 and "not available" in warnings[0], (name, warnings)
    assert state() == stock, (name, state(), stock)
    assert vars(Half)["get_attn_backend_cls"] is half, name
    AttentionConfig(backend="cpu_attn")
    if name == "no registry":
        continue  # there is no look-up that could say why
    reason = warnings[0].removesuffix("; vLLM runs as without it")
    try:
        AttentionConfig(backend="sparse")
    except ValueError as error:
        assert reason in str(error), (name, reason, str(error))
    else:
        raise AssertionError(name)
    print(warnings[0])

warnings.clear()
sys.modules["vllm"].__version_tuple__ = (0, 99, 0)
register()
register()
assert len(warnings) == 1 and "tested with vLLM 0.31 to 0.33" in warnings[0], warnings
assert AttentionConfig(backend="sparse").backend.value == compat.BACKEND_PATH
assert "vllm_sparse.backend.backend" not in sys.modules
# A vLLM that calls with other arguments, and has other configs, is passed through to.
warnings.clear()
class Other:
    @classmethod
    def get_attn_backend_cls(cls, selected, config, *, more):
        return selected, config, more
    @classmethod
    def check_and_update_config(cls, *configs, more=None):
        return configs, more
with Patch(vllm.platforms, "current_platform", Other()):
    register()
assert Other.get_attn_backend_cls(None, 1, more=2) == (None, 1, 2)
assert Other.check_and_update_config(Bare(), 3, more=4)[1] == 4
assert Other.check_and_update_config(more=5) == ((), 5)
assert not warnings, warnings
class Odd:
    @property
    def attention_config(self):
        raise RuntimeError("odd")
assert Other.check_and_update_config(Odd())[1] is None
assert len(warnings) == 1 and "RuntimeError: odd" in warnings[0], warnings
# The worker's hooks, in an engine that asks.
from vllm.v1.worker import worker_base
del worker_base.WorkerWrapperBase.initialize_from_config
try:
    install._install_hooks()
except RuntimeError as error:
    assert "--attention-backend sparse is not available: AttributeError" in str(error), error
else:
    raise AssertionError("no worker hooks, and no word of it")
print("ALL")
"""


def test_whatever_breaks_is_one_warning_and_stock_is_untouched():
    printed = run_python(BREAKS).splitlines()
    assert printed[-1] == "ALL"
    for said in ("this is vLLM", "get_attn_backend_cls", "check_and_update_config", "not in this vLLM"):
        assert any(said in line for line in printed), said


FAKE = """
import sys, types, logging
for name in ("vllm", "vllm.platforms", "vllm.v1"):
    sys.modules[name] = types.ModuleType(name)
from vllm_sparse.plugin_entrypoints import register
register(); register()
import enum
class Colors(enum.Enum):
    RED = 1
assert Colors["RED"].value == 1
try:
    Colors["SPARSE"]
except KeyError:
    print("stock")
"""


def test_a_vllm_of_other_parts_is_left_alone():
    assert run_python(FAKE) == "stock\n"


def test_a_gpu_without_triton_is_refused_by_name(monkeypatch):
    import sys
    from types import SimpleNamespace

    import vllm.platforms

    from vllm_sparse.backend import check
    from vllm_sparse.errors import ConfigError

    monkeypatch.setattr(vllm.platforms, "_current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="--attention-backend sparse: its kernels need Triton"):
        check.check_engine(SimpleNamespace(additional_config={}))

"""How the plugin enters vLLM: one name, pass-through hooks, and nothing else for who does not ask."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomllib
import torch

pytest.importorskip("vllm")

from conftest import CPU_ENGINE
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparse.backend import compat
from vllm_sparse.plugin_entrypoints import register
from vllm_sparse.tools import cli

pytestmark = pytest.mark.seam


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run ``code`` in a fresh process; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, **CPU_ENGINE, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_entry_point_is_registered():
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "sparse"]
    assert entry.load() is register


def test_command_is_installed():
    (entry,) = entry_points(group="console_scripts", name="vllm-sparse")
    assert entry.load() is cli.main


def test_a_plain_install_has_every_package():
    """Tests import from the source tree, where a package that pyproject.toml forgets is found all the same."""
    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent
        for top in ("vllm_sparse", "kernels", "plugin_entrypoints")
        for path in (root / top).rglob("*.py")
    }
    names = {".".join(folder.relative_to(root).parts) for folder in folders}
    installed = {name if name.startswith("vllm_sparse") else f"vllm_sparse.{name}" for name in names}
    assert installed == set(listed)


def test_register_is_reentrant():
    register()
    platform = type(current_platform)
    before = {name: vars(platform)[name] for name in ("get_attn_backend_cls", "check_and_update_config")}
    members = list(AttentionBackendEnum)
    register()
    register()
    assert {name: vars(platform)[name] for name in before} == before, "a hook was wrapped twice"
    assert list(AttentionBackendEnum) == members
    assert [member.name for member in members].count("SPARSE") == 1


def test_backend_name_is_a_member_like_the_others():
    register()
    member = AttentionBackendEnum["SPARSE"]
    assert member is AttentionBackendEnum(compat.BACKEND_PATH) is AttentionBackendEnum.SPARSE
    assert member.get_class().get_name() == "SPARSE"
    assert not member.get_class().is_sparse(), "to vLLM that word means sparsity of the model's own"
    others = [other for other in AttentionBackendEnum if other is not member]
    assert pickle.loads(pickle.dumps(others)) == others
    assert pickle.loads(pickle.dumps(member)) is member


def test_backend_name_unpickles_in_a_process_without_plugins():
    """Engine and worker processes unpickle vLLM's config before they load plugins."""
    register()
    from vllm.config import AttentionConfig

    config = AttentionConfig(backend="sparse", backend_per_kind={"full_attention": "sparse"})
    code = """
        import pickle, sys
        assert "vllm_sparse" not in sys.modules and "vllm" not in sys.modules
        config = pickle.loads(bytes.fromhex(sys.argv[1]))
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        assert config.backend is config.backend_per_kind["full_attention"] is AttentionBackendEnum.SPARSE
        print(config.backend.name, config.backend.value)
        from vllm_sparse.plugin_entrypoints import register
        register()
        assert config.backend is AttentionBackendEnum.SPARSE
    """
    printed = run_python(code, pickle.dumps(config).hex())
    assert printed.splitlines()[-1] == f"SPARSE {compat.BACKEND_PATH}"


@pytest.mark.engine
@pytest.mark.processes
def test_without_the_flag_vllm_is_as_without_the_plugin(tiny):
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import conftest
        from tiny_engine import ENGINE, attention_layers, prompts, tokens

        if __name__ == "__main__":
            from vllm import LLM
            from vllm.platforms import current_platform
            llm = LLM(sys.argv[2], block_size=32, **ENGINE)
            print(tokens(llm, prompts()))
            layers = attention_layers(llm).values()
            print({(layer.attn_backend.get_name(), type(layer.impl).__name__) for layer in layers})
            print(hasattr(current_platform.get_attn_backend_cls, "_vllm_sparse"))
            print(sorted(name for name in sys.modules if name.startswith("vllm_sparse")))
    """
    arguments = (os.path.dirname(__file__), str(tiny.model()))
    plain = run_python(code, *arguments, VLLM_PLUGINS="").splitlines()[-4:]
    loaded = run_python(code, *arguments).splitlines()[-4:]
    assert plain[2:] == ["False", "[]"]
    assert loaded[2] == "True", "the plugin was not loaded: nothing was compared"
    assert loaded[:2] == plain[:2]
    assert "CPU_ATTN" in loaded[1]
    assert "vllm_sparse.backend.compat" in loaded[3]
    for module in ("backend.hooks", "backend.impl", "config", "pages", "policies", "kernels", "attention"):
        assert f"'vllm_sparse.{module}'" not in loaded[3]


def test_whoever_asks_the_selector_itself_gets_what_vllm_would_choose():
    """Layers that wrap another backend do, and latent attention; plain layers are decided about before."""
    from vllm_sparse.backend import hooks

    register()
    hooks.install()
    config = AttentionSelectorConfig(head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=32)
    chosen = {
        name: current_platform.get_attn_backend_cls(name and AttentionBackendEnum[name], config, num_heads=4)
        for name in ("SPARSE", None, "CPU_ATTN")
    }
    assert len(set(chosen.values())) == 1 and "CPUAttentionBackend" in chosen["SPARSE"]

"""What is published: a wheel with every file of the package, which asks for nothing and replaces nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import vllm_sparse

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "vllm_sparse": "vllm_sparse",
    "kernels": "vllm_sparse/kernels",
    "plugin_entrypoints": "vllm_sparse/plugin_entrypoints",
}
"""Folders of the checkout, and where a wheel has them."""
BUILD = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", *PACKAGES)
"""All that a build may need: it is tried on a copy of these, as it writes beside its sources."""


def run(*args: str | Path, **options) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution that it was built from, without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_both_distributions_pass_the_checks_of_an_upload(built):
    names = sorted(path.name for path in built.iterdir())
    version = vllm_sparse.__version__
    assert names == [f"vllm_sparse-{version}-py3-none-any.whl", f"vllm_sparse-{version}.tar.gz"]
    assert run("twine", "check", "--strict", *built.iterdir()).count("PASSED") == 2


def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"vllm_sparse/py.typed", "vllm_sparse/kernels/__init__.py"} <= held


def test_the_version_stands_in_one_place(metadata):
    assert metadata["Version"] == vllm_sparse.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {vllm_sparse.__version__} " in changes, "CHANGELOG.md has no entry for this version"


def test_a_plain_install_asks_for_nothing(metadata):
    """vLLM and torch stay what they are: whatever is required belongs to an extra."""
    asked = metadata.get_all("Requires-Dist", [])
    assert [one for one in asked if "extra ==" not in one] == []
    assert all("torch" not in one for one in asked)


def test_pip_would_install_the_wheel_alone(wheel):
    """Beside the torch and vLLM of this environment, and without an index to take others from."""
    options = ("--no-index", "--dry-run", "--ignore-installed", "--quiet", "--report", "-")
    said = run("pip", "install", *options, wheel)
    assert [found["metadata"]["name"] for found in json.loads(said)["install"]] == ["vllm-sparse"]


def test_an_installed_wheel_runs_and_names_its_plugin(wheel, tmp_path):
    run("pip", "install", "--no-index", "--no-deps", "--quiet", "--target", tmp_path, wheel)
    points = next(tmp_path.glob("*.dist-info")) / "entry_points.txt"
    assert "sparse = vllm_sparse.plugin_entrypoints:register" in points.read_text()
    code = """
import vllm_sparse.kernels, vllm_sparse.kernels.reference, vllm_sparse.plugin_entrypoints
from vllm_sparse.tools import cli
print(vllm_sparse.kernels.__file__)
cli.main(["--help"])
"""
    (tmp_path / "as_installed.py").write_text(code)
    said = run("as_installed", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert said.startswith(f"{tmp_path}/vllm_sparse/kernels/__init__.py") and "plan" in said

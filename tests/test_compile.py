"""Kernels compile for real GPUs on a machine without one, down to what the driver would load.

:mod:`compile_kernels` says for which layers, and with which variants.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CAPABILITIES = ("80", "89", "90")


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    """Python in the tests' folder, with Triton's compiler and not its interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=TESTS, env={**inherited, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launched_kernels() -> set[str]:
    """Names of kernels that some launcher launches, as ``_name[grid](...)``."""
    sources = "".join(path.read_text() for path in (TESTS.parent / "kernels").glob("*.py"))
    return set(re.findall(r"^ +(_\w+)\[[^\]]+\]\(", sources, re.MULTILINE))


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """A process for each capability; side by side they take little longer than one."""
    pytest.importorskip("triton")
    probe = start(["-c", "from triton import knobs; print(knobs.nvidia.ptxas.path)"])
    said, _ = probe.communicate(timeout=120)
    if probe.returncode:
        pytest.skip(f"this Triton has no ptxas, so it compiles for no GPU: {said.strip()[-200:]}")
    processes = {}
    for capability in CAPABILITIES:
        # Triton's cache of an earlier run would leave nothing to compile.
        cache = str(tmp_path_factory.mktemp("triton"))
        processes[capability] = start(["compile_kernels.py", capability], TRITON_CACHE_DIR=cache)
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(compilations, capability):
    said, _ = compilations[capability].communicate(timeout=1500)
    assert compilations[capability].returncode == 0, said[-4000:]
    sizes = re.findall(r"^  (_\w+): (\d+) bytes", said, re.MULTILINE)
    kernels = launched_kernels()
    assert len(kernels) >= 8, "launches are not found in the sources any more"
    assert {name for name, _ in sizes} == kernels
    assert all(int(size) > 0 for _, size in sizes)

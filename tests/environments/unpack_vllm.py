"""Unpack the Python files of vLLM's CUDA wheel beside the compiled modules of its CPU build.

``python unpack_vllm.py WHEEL SITE_PACKAGES CPU_SITE_PACKAGES``. The newest vLLM has a wheel for CUDA alone, which
a machine without a GPU cannot load. Its scheduler, planner and model runners are Python, and the few compiled
operators that a small model needs on a CPU are those of the release before.
"""

import sys
from pathlib import Path
from zipfile import ZipFile

LEFT_OUT = (".so", ".h", ".hpp", ".cuh", ".inl", "/vllm-rs", "/RECORD")


def main(wheel: str, site_packages: Path, cpu_site_packages: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(site_packages, [name for name in archive.namelist() if not name.endswith(LEFT_OUT)])
    for compiled in (cpu_site_packages / "vllm").glob("*.so"):
        (site_packages / "vllm" / compiled.name).symlink_to(compiled.resolve())
    # vLLM reads its platform from the version that its distribution has.
    (metadata,) = site_packages.glob("vllm-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    marked = [f"{line.rstrip()}+cpu\n" if line.startswith("Version:") else line for line in lines]
    metadata.write_text("".join(marked), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))

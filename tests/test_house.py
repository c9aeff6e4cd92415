"""The layout of the sources: what imports what, and where things lie."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "vllm_sparse": "vllm_sparse",
    "kernels": "vllm_sparse.kernels",
    "plugin_entrypoints": "vllm_sparse.plugin_entrypoints",
}
"""Folders of the checkout, and the names under which they are imported."""
MOST_LOOSE_MODULES = 8
ALLOWED = {"kernels": {"kernels", "pages"}, "pages": {"pages", "errors"}}
"""What a part of vllm_sparse may import of the others."""


def modules() -> dict[str, Path]:
    """The file of each module, by the name it is imported under."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(source: str, known: set[str]) -> Iterator[str]:
    """Modules among ``known`` that ``source`` imports, at its top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in within]
        else:
            continue
        yield from (name for name in names if name in known)


def graph() -> dict[str, set[str]]:
    """The imports of each module; the package itself, which imports nothing, is left out."""
    files = modules()
    files.pop("vllm_sparse")
    known = set(files)
    return {name: set(imported(path.read_text(), known)) - {name} for name, path in files.items()}


def part(module: str) -> str:
    """The room of a module: the first name below vllm_sparse."""
    return module.split(".")[1]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def crossings(imports: dict[str, set[str]], room: str) -> list[str]:
    """Imports out of ``room`` that it is not allowed."""
    return sorted(
        f"{name} imports {other}"
        for name, others in imports.items()
        if part(name) == room
        for other in others
        if part(other) not in ALLOWED[room]
    )


def unnamed(text: str) -> list[str]:
    """Folders and modules at the top of vllm_sparse, and folders beside it, that ``text`` does not name."""
    top = ROOT / "vllm_sparse"
    places = [f"{path.name}/" for path in top.iterdir() if (path / "__init__.py").exists()]
    places += [path.name for path in top.glob("*.py") if path.name != "__init__.py"]
    places += [f"{name}/" for name in (*PACKAGES, "tests", "benchmarks", "docs", "examples")]
    return [place for place in sorted(places) if not re.search(rf"(?m)^ *{re.escape(place)}(?=\s)", text)]


def test_nothing_imports_in_a_circle():
    assert circle(graph()) == []


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    assert crossings(graph(), room) == []


def test_few_modules_lie_loose():
    loose = {path.name for path in (ROOT / "vllm_sparse").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= MOST_LOOSE_MODULES, sorted(loose)


def test_contributing_names_every_place():
    assert unnamed((ROOT / "CONTRIBUTING.md").read_text()) == []


def test_the_checks_can_fail():
    """A graph that finds no imports would pass them all."""
    imports = graph()
    assert "vllm_sparse.errors" in imports["vllm_sparse.config"]
    assert "vllm_sparse.errors" in set(imported("def f():\n    from vllm_sparse import errors", set(imports)))
    assert circle({**imports, "vllm_sparse.errors": {"vllm_sparse.config"}})
    for room in ALLOWED:
        stray = f"vllm_sparse.{room}.stray"
        assert crossings({**imports, stray: {"vllm_sparse.config"}}, room) == [
            f"{stray} imports vllm_sparse.config"
        ]
    assert {"pages/", "errors.py", "kernels/", "tests/"} <= set(unnamed(""))

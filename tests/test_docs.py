"""The documentation: it builds without a warning, names what exists, and its generated pages are current."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import tables
from vllm_sparse.attention.registry import ATTENTION_KERNELS
from vllm_sparse.config import DEFAULT_PRESET
from vllm_sparse.policies import DECODE_POLICIES, PREFILL_POLICIES, PRESETS
from vllm_sparse.tools import settings_page, site_links

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 1200
HOLE = "\0"
"""Stands for a value in a message."""
LEAST_LETTERS = 8
"""Of the part of a message between two values by which it is looked for."""


def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()


def test_files_beside_the_pages_are_named_on_the_site():
    def shown(text: str) -> str:
        return site_links.named(text, DOCS / "benchmarks", DOCS)

    assert (
        shown("see [engine.jsonl](../../benchmarks/results/engine.jsonl)")
        == "see `benchmarks/results/engine.jsonl`"
    )
    assert shown("[its licence](../../LICENSE#x).") == "its licence (`LICENSE`)."
    for kept in ("[a page](../settings.md)", "[gone](../../nowhere.md)", "![plot](../offload.png)"):
        assert shown(kept) == kept


@pytest.mark.parametrize(
    ("path", "made", "command"),
    [
        (settings_page.PATH, settings_page.page, settings_page.COMMAND),
        (tables.SPEED, tables.page, tables.COMMAND),
        (tables.README, lambda: tables.with_headline(README), tables.COMMAND),
    ],
    ids=["settings", "speed", "README"],
)
def test_generated_pages_are_current(path, made, command):
    assert (ROOT / path).read_text(encoding="utf-8") == made(), f"run `{command}`"


def test_settings_are_explained_in_plain_words():
    page = settings_page.page()
    assert ":mod:" not in page and "``" not in page.replace("```", "")
    assert "| `budget_tokens` | `2048` | whole number | Tokens attended in a decode step" in page


def test_the_readme_is_short_and_has_a_measured_sentence():
    assert len(README.split()) <= MOST_WORDS
    assert len(tables.HEADLINE.findall(README)) == 1
    assert "fp8 KV cache" in tables.headline() and "vLLM 0." in tables.headline()


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert len(targets) > 10
    assert [one for one in targets if not one.startswith("https://") and not (ROOT / one).exists()] == []


def test_every_method_has_a_row():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    names = [*DECODE_POLICIES, *PREFILL_POLICIES, *ATTENTION_KERNELS]
    assert [name for name in names if f"\n| `{name}` |" not in page] == []


@pytest.mark.parametrize("page", ["README.md", "docs/presets.md"])
def test_presets_are_what_the_pages_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`( \(default\))? \| `(\w+)` \|", text, re.MULTILINE)
    assert {name: {"decode_policy": policy} for name, _, policy in rows} == PRESETS
    assert [name for name, default, _ in rows if default] == [DEFAULT_PRESET]


def messages() -> Iterator[str]:
    """What the package logs and raises for a user to read, commands left out: they say at once what is allowed."""
    for folder in ("vllm_sparse", "plugin_entrypoints"):
        for path in (ROOT / folder).rglob("*.py"):
            if "tools" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _tells(node.func):
                    yield from filter(None, map(_text, node.args))


def _tells(called: ast.expr) -> bool:
    """Whether a call is a line in the log or an error for users."""
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in ("info", "warning", "log_once", "ConfigError", "RuntimeError", "VLLMValidationError")


def _text(argument: ast.expr) -> str:
    """The text of an argument, with holes for values; '' where it is none."""
    if isinstance(argument, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in argument.values)
    text = argument.value if isinstance(argument, ast.Constant) else None
    return re.sub(r"%[\d.]*[a-z]", HOLE, text).replace("%%", "%") if isinstance(text, str) else ""


def unexplained(page: str) -> list[str]:
    """Messages that ``page`` does not quote: the first eight words of their first part with three or more."""
    flat = " ".join(page.replace("`", "").split())
    parts = ([part.strip(" .;:,%()'\"") for part in message.split(HOLE)] for message in messages())
    told = (next((part for part in each if len(part.split()) >= 3), max(each, key=len)) for each in parts)
    begins = (" ".join(part.replace("`", "").split()[:8]) for part in told if len(part) >= LEAST_LETTERS)
    return [begin for begin in dict.fromkeys(begins) if begin not in flat]


def test_troubleshooting_has_every_message():
    assert unexplained((DOCS / "troubleshooting.md").read_text(encoding="utf-8")) == []
    assert len(unexplained("")) > 50

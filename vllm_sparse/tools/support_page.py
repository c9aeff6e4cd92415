"""``docs/support.md``, made from the tables that decide: ``python -m vllm_sparse.tools.support_page [PATH]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vllm_sparse.backend.connectors import BLOCKS, CONNECTORS, NEITHER, SLOTS
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.support import FEATURES, OPTIONS, ROWS
from vllm_sparse.tools.families import FAMILIES
from vllm_sparse.tools.markdown import table as _table

PATH = Path("docs/support.md")
COMMAND = "python -m vllm_sparse.tools.support_page"
CARRIED = {BLOCKS: "yes", SLOTS: "with `dense` policies only", NEITHER: "no"}


def page() -> str:
    """The page, as Markdown."""
    layers = ((row.what, row.treatment.value, _filled(row.reason)) for row in ROWS)
    families = (
        (family.what, family.models, family.sparse, ", ".join(f"`{test}`" for test in family.tests) or "none")
        for family in FAMILIES
    )
    options = (
        (
            f"`{option.name}`",
            option.values + (", with `offload`" if option.with_offload else ""),
            option.reason,
            option.allowed.format(dtype="the model's dtype"),
        )
        for option in OPTIONS
    )
    connectors = (
        (f"`{name}`", CARRIED[known.copies], known.reason, known.apart or "-", _named(known.tests))
        for name, known in CONNECTORS.items()
    )
    features = (
        (feature.what, feature.how, _named(feature.tests), _named(feature.on_gpus)) for feature in FEATURES
    )
    sizes = ", ".join(map(str, PAGE_SIZES))
    return "\n".join([
        f"<!-- Made by `{COMMAND}`; edits are lost. -->",
        "# What runs sparse, and what does not",
        "",
        "Nothing is left out silently: an engine's start line counts its layers by the reasons below, and so does",
        '`collective_rpc("sparse_metrics")`; what is refused stops the start and is told what is allowed.',
        "",
        "## Layers and models",
        "",
        "A layer takes the first row that holds for it, and runs sparse where none does. `dense` layers attend to",
        "every page of our layout, `stock` layers are vLLM's own, and `refused` ones stop the start.",
        "",
        *_table(("layers", "run", "why"), layers),
        "",
        "## Families of models",
        "",
        "Tests start a tiny random model in stock vLLM and sparse: the same answers where everything is attended,",
        "fewer tokens read at a small budget. Those named `test_gpu_*` need a GPU: on an H200 with vLLM 0.33",
        "gpt-oss, Gemma 2, Granite 4 and LFM2 passed, with CUDA graphs; the others were not run yet.",
        "On a CPU vLLM has no kernels for MiniMax-M3 and for most families without sparse layers: their tests",
        "build the models and count layers.",
        "",
        *_table(("family", "models", "sparse", "tests"), families),
        "",
        "## Options of vLLM",
        "",
        f"`--block-size` must be a page size: {sizes}. These options are refused:",
        "",
        *_table(("option", "refused values", "why", "allowed"), options),
        "",
        "## Several GPUs, LoRA, sleep, new weights",
        "",
        "Each runs beside sparse attention. Tests of the third column run in CI on CPUs, and compare answers with",
        "those of stock vLLM; tests of the fourth need GPUs, and that of expert parallel was not run yet.",
        "",
        *_table(("feature", "how", "tests on CPUs", "tests on GPUs"), features),
        "",
        "## KV connectors",
        "",
        "A page ends in its summary: connectors that copy whole blocks carry it, those that copy K and V by",
        "token slot lose it. Connectors that are not listed are refused; a `MultiConnector` is what is inside it.",
        "Tests of NIXL and LMCache run the real libraries on a CPU, where these are installed.",
        "",
        *_table(
            ("connector", "allowed", "what it does", "what keeps other engines' pages out", "tests"), connectors
        ),
        "",
    ])  # fmt: skip


def _named(tests: tuple[str, ...]) -> str:
    return ", ".join(f"`{test}`" for test in tests) or "-"


def _filled(reason: str) -> str:
    """``reason`` with the names of a layer's fields in place of their values."""
    named = re.sub(r"(?<!\{)\{([\w.]+)\}(?!\})", lambda field: f"*{field[1].rpartition('.')[2]}*", reason)
    return named.replace("{{", "{").replace("}}", "}")


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.write_text(page(), encoding="utf-8")

"""``docs/settings.md``, made from the dataclasses: ``python -m vllm_sparse.tools.settings_page [PATH]``."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from vllm_sparse.attention.registry import ATTENTION_KERNELS
from vllm_sparse.config import TABLES, SparseConfig
from vllm_sparse.offload.config import HOST_DTYPES, OffloadConfig
from vllm_sparse.policies import DECODE_POLICIES, PREFILL_POLICIES, PRESETS
from vllm_sparse.tools.markdown import table

PATH = Path("docs/settings.md")
COMMAND = "python -m vllm_sparse.tools.settings_page"
NAMES: dict[str, Collection[str]] = {
    "preset": PRESETS,
    "decode_policy": DECODE_POLICIES,
    "prefill_policy": PREFILL_POLICIES,
    "attention_kernel": ("auto", *ATTENTION_KERNELS),
    "host_dtype": HOST_DTYPES,
}
"""What the values of a setting may be called."""
KINDS = {
    "int": "whole number",
    "int | None": "whole number",
    "float": "number",
    "float | str": "number, or `auto`",
}
"""What else they may be, by the type of the field."""
PAGES = {
    "vllm_sparse.policies.registry.PRESETS": "[the presets](presets.md)",
    "vllm_sparse.policies": "[the methods](methods.md)",
    "vllm_sparse.attention.registry": "[the attention kernels](methods.md#attention-kernels)",
    "vllm_sparse.decode.recall_monitor": "[is it working?](working.md#recall)",
    "vllm_sparse.kernels.e4m3": "[offload](offload.md#fp8-on-the-host)",
}
"""What explains to a user what a module's docstring does."""


HEAD = ("key", "default", "allowed", "meaning")
BEGIN = """\
# Settings

Settings are one JSON object under the key `sparse` of vLLM's `--additional-config`:

```sh
vllm serve MODEL --attention-backend sparse --additional-config '{"sparse": {"budget_tokens": 1024}}'
```

In Python it is `LLM(attention_backend="sparse", additional_config={"sparse": {...}})`. Where that key is
missing, the environment variable `VLLM_SPARSE_CONFIG` is read: the same object without the key around it, or
the path of a JSON file that holds it. With several GPUs or nodes settings travel inside vLLM's own config, and
files that they name are read on the first node only.

A wrong key or value stops the start with a message that names the key, the value and what is allowed. Settings
that stand where nothing reads them are refused with the right place, and without `--attention-backend sparse` a
warning names them. Whole numbers go up to 2,147,483,647. What a file of `vllm-sparse tune` is:
[Tuning](tuning.md).
"""
OFFLOAD = """
## Offload

The value of `offload` is an object, `{}` for all defaults: [Offload](offload.md).
"""
END = """
## Layers of one kind only

`attention_config={"backend_per_kind": {"full_attention": "sparse"}}` asks for full-attention layers alone. vLLM
parses `attention_config` before it loads plugins: in Python call `vllm_sparse.plugin_entrypoints.register()`
first, or use `attention_backend="sparse"`, which needs nothing.
"""


def page() -> str:
    """The page, as Markdown."""
    made = f"<!-- Made by `{COMMAND}`; edits are lost. -->"
    tables = (table(HEAD, _rows(kind)) for kind in (SparseConfig, OffloadConfig))
    return "\n".join([made, BEGIN, *next(tables), OFFLOAD, *next(tables), END])


def _rows(kind: type) -> list[tuple[str, str, str, str]]:
    said, defaults = meanings(kind), kind()
    return [
        (f"`{one.name}`", f"`{_default(getattr(defaults, one.name))}`", _allowed(one), said[one.name])
        for one in fields(kind)
    ]


def _default(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(field) -> str:
    if field.name in NAMES:
        return ", ".join(f"`{name}`" for name in NAMES[field.name])
    if field.name in TABLES:
        return "`none`, `auto`, or a file's path"
    return KINDS.get(field.type, "an object, or `null`")


def meanings(kind: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, as Markdown in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return {
        statement.target.id: _markdown(after.value.value)
        for statement, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda role: PAGES.get(role[1], f"`{role[1]}`"), text)
    return re.sub(r"\s+", " ", re.sub(r"\bNone\b", "`null`", text.replace("``", "`")))


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.write_text(page(), encoding="utf-8")

"""Choose from results/kernels.jsonl what `vllm-sparse check` forecasts by: the latest row of each kind.

python -m benchmarks.kernel_rows
"""

from __future__ import annotations

import json
import re

from benchmarks import results
from benchmarks.batch_spec import parse
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.tools.pays import ROWS

RUN = ("gpu", "vllm", "commit", "policy", "batch_spec", "kv_dtype")
KIND = ("gpu", "summary", "kv_dtype")


def main() -> None:
    ROWS.write_text(text(), encoding="utf-8")


def text() -> str:
    """The file, a row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in chosen()) + "\n]\n"


def chosen() -> list[dict]:
    """Rows without drafts, the last one of each GPU, summary, dtype of KV and batch."""
    steps: dict[tuple, dict] = {}
    for line in (results.RESULTS / "kernels.jsonl").read_text().splitlines():
        row = json.loads(line)
        if not row.get("drafts"):
            run = tuple(row.get(key) for key in RUN)
            steps.setdefault(run, {}).update(row, **{row["kernel"]: row["us"]})
            if row["kernel"] == "score":
                steps[run]["scored_bytes"] = row.get("bytes")
    found = {}
    for step in steps.values():
        # Where nothing was scored all was dense, and no page was chosen.
        if {"sparse_step", "dense_fa3"} <= set(step) and step.get("scored_bytes") != 0:
            row = _row(step)
            found[tuple(row[key] for key in (*KIND, "batch_spec"))] = row
    return sorted(found.values(), key=lambda row: tuple(row[key] for key in (*KIND, "dense_bytes")))


def _row(step: dict) -> dict:
    heads, _, head_dim = map(int, re.match(r"kv(\d+)_group(\d+)_d(\d+)", step["shape"]).groups())
    kv_dtype = step.get("kv_dtype", "bf16")
    token_bytes = heads * 2 * head_dim * (1 if kv_dtype == "fp8" else 2)
    requests = parse(step["batch_spec"])
    writes = (step["stock_write"], step["page_write"]) if "stock_write" in step else (0.0, 0.0)  # or neither
    return {
        "gpu": step["gpu"], "vllm": step["vllm"], "commit": step["commit"], "kv_dtype": kv_dtype,
        "summary": DECODE_POLICIES[step["policy"]].summary, "policy": step["policy"], "budget": step["budget"],
        "batch_spec": step["batch_spec"],
        "dense_bytes": sum(request.context_tokens for request in requests) * token_bytes,
        "stock_us": round(step["dense_fa3"] + writes[0], 2),
        "sparse_us": round(step["sparse_step"] + writes[1], 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()

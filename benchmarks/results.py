"""Raw results: one JSON line per measurement, with everything needed to read it later."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from vllm_sparse.tools.eval import rows

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The measured commit: what the file ``COMMIT`` beside a copy of the sources says, else git's, with
    ``+`` where the package differs from it."""
    root = Path(__file__).parent.parent
    file = root / "COMMIT"
    return file.read_text().strip() if file.exists() else rows.commit(root) or "unknown"


def environment() -> dict:
    """GPU, versions, commit and date of this machine."""
    import torch

    try:
        import vllm

        vllm_version = vllm.__version__
    except ImportError:
        vllm_version = "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"gpu": gpu, "vllm": vllm_version, "torch": torch.__version__, "commit": commit(), "date": date}


def append(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Append rows to ``<folder>/<name>.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path

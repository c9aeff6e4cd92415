"""A real Prometheus beside a server on this machine, and its promtool: both are in Debian's package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPACKED = Path(__file__).parent.parent / ".venv" / "prometheus" / "usr" / "bin"
"""Where the Makefile unpacks that package."""
START_SECONDS = 30


def binary(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``.

    Raises:
        FileNotFoundError: this machine has none.
    """
    found = shutil.which(name, path=f"{UNPACKED}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise FileNotFoundError(f"there is no {name} here: Debian's package prometheus has it")
    return found


class Prometheus:
    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, **parameters) -> list[dict]:
        """Series of ``query`` or ``query_range``; an expression that Prometheus cannot parse is an error."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as response:
            return json.load(response)["data"]["result"]

    def query(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)


@contextmanager
def scraping(folder: Path, *urls: str) -> Iterator[Prometheus]:
    """A Prometheus that asks servers for ``/metrics`` once a second; its files go to ``folder``."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    targets = [url.removeprefix("http://") for url in urls]
    jobs = [{"job_name": "vllm", "static_configs": [{"targets": targets}]}]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML
    command = [
        binary("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _started(Prometheus(f"http://127.0.0.1:{port}"), process, folder / "log")
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def _started(prometheus: Prometheus, process: subprocess.Popen, log: Path) -> Prometheus:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            prometheus.query("up")
            return prometheus
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.1)

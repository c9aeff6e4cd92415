"""``vllm serve`` of a tiny model with the backend, in processes of its own as in production."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from process import free_port, running
from tiny_engine import ENGINE

START_SECONDS = 240
MAX_TOKENS = 48
GREEDY = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Server:
    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log

    def request(self, path: str, body: dict | None = None):
        """The raw response; POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    def choice(self, path: str, **body) -> dict:
        with self.request(path, {"model": "tiny", **GREEDY, **body}) as response:
            (choice,) = json.load(response)["choices"]
        return choice

    def wait(self) -> Server:
        """Itself, once it serves."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-6000:]}"
            try:
                self.request("/health").close()
                return self
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-6000:]}")


@contextmanager
def serve(folder: Path, model: Path, sparse: dict, *arguments: str, program=None, **environment):
    """A server that is still starting; its log goes to ``folder``. ``program`` stands in for ``vllm``."""
    port = free_port()
    settings = {**ENGINE, "block_size": 32, "port": port, "host": "127.0.0.1", "served_model_name": "tiny"}
    eager = settings.pop("enforce_eager")
    command = [
        *(program or [sys.executable, "-m", "vllm.entrypoints.cli.main"]), "serve", model,
        *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items()),
        *(["--enforce-eager"] if eager else []), "--attention-backend=sparse",
        f"--additional-config={json.dumps({'sparse': sparse})}", *arguments,
    ]  # fmt: skip
    log = folder / "log"
    # As in production: an engine process of its own, and warm-up steps, which have no attention metadata.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": None, "VLLM_CPU_CI_ENV": None, **environment}
    with running(command, log, **environment) as process:
        yield Server(process, port, log)

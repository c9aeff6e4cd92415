"""A `vllm serve` process that lives as long as a `with` block, and a client for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from tqdm import tqdm

READY_TIMEOUT_S = 600
STOP_TIMEOUT_S = 20
LOG_TAIL_LINES = 40
# What lets a small CPU serve a small model soon: a KV cache that fits, no compilation, no warm-up.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "TORCHDYNAMO_DISABLE": "1"}

# A proxy from the environment must not stand between this process and its own server.
_http = build_opener(ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start or died; the message ends with the last lines of its log."""


class Server:
    """``environment`` adds to this process's own. The model's served name is "demo"."""

    def __init__(
        self,
        model: Path | str,
        arguments: list[str],
        log_path: Path,
        on_gpu: bool,
        environment: dict | None = None,
    ):
        self.port = _free_port()
        self.log_path = log_path
        self._command = ["serve", str(model), "--served-model-name", "demo", *arguments]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        if not on_gpu:
            self.environment.update(CPU_ENVIRONMENT)

    def __enter__(self) -> "Server":
        # The interpreter that runs this, so that no other vLLM on the PATH is started.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *self._command]
        with self.log_path.open("w") as log:
            # A session of its own, so that the engine's worker processes can be ended with it.
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            with elapsed("starting vLLM"):
                self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_session(self._process.pid)
            self._process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stream_chat(self, messages: list[dict], **options) -> Iterator[str]:
        """Continue the last message word by word, greedily."""
        body = {
            "model": "demo",
            "messages": messages,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "temperature": 0,
            "stream": True,
            **options,
        }
        request = Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with _http.open(request) as response:
                yield from _contents(response)
        except OSError as error:
            raise ServerError(f"The request failed: {error}. {self.tail()}") from error

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise ServerError(f"vLLM ended with code {self._process.returncode}. {self.tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"vLLM was not ready after {READY_TIMEOUT_S} s. {self.tail()}")
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            self.get("/health")
            return True
        except (URLError, OSError):
            return False

    def get(self, path: str) -> str:
        with _http.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return response.read().decode()

    def tail(self) -> str:
        lines = "\n".join(deque(self.log().splitlines(), LOG_TAIL_LINES))
        return f"The end of {self.log_path}:\n{lines}"


def _contents(response) -> Iterator[str]:
    """The text pieces of a stream of server-sent events."""
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServerError(f"The server refused: {event['error'].get('message', event)}")
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _kill_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def elapsed(title: str):
    """A running clock, for waits whose end nobody knows."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            bar.refresh()

    # Only for a terminal: a log would get a line of it every half second.
    with tqdm(bar_format=f"{title} {{elapsed}}", leave=False, disable=None) as bar:
        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()

"""Processes that each hold an engine, and measure it when it is their turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

LOG_TAIL_LINES = 30
GONE_TIMEOUT_S = 5
READY, RESULT = "READY", "RESULT "


def wait_for_turn() -> None:
    """In a worker: say that its engine has started, and return when it may be measured."""
    print(READY, flush=True)
    sys.stdin.readline()


def report(found: dict) -> None:
    """In a worker: what it found of its engine."""
    print(RESULT + json.dumps(found), flush=True)


class Worker:
    """A process that starts an engine, and what it reported; as a context it is gone at the end with all that
    it started.

    Of one that fails, or takes longer than ``limit_s`` to start and to be measured, waiting for its turn aside,
    there is what it reported until then, and the ``reason``.
    """

    def __init__(self, command: list[str], limit_s: float):
        self._limit_s = self._left_s = limit_s
        self._log = tempfile.NamedTemporaryFile("a")  # noqa: SIM115
        # A session of its own: an engine's processes must not outlive it, for they hold the GPU's memory.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, start_new_session=True, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self._end()
        self._log.close()

    def wait_until_ready(self) -> None:
        """Return when the engine has started, or has failed to."""
        start = time.monotonic()
        while self._process.poll() is None and READY not in self._lines():
            if time.monotonic() - start > self._left_s:
                break
            time.sleep(0.2)
        self._left_s -= time.monotonic() - start

    def measure(self) -> dict:
        """Let the engine be measured, and wait until its process has ended."""
        reason = ""
        with suppress(BrokenPipeError):  # it has ended, and the log says why
            self._process.stdin.write("\n")
            self._process.stdin.close()
        try:
            if self._process.wait(max(self._left_s, 0)):
                reason = f"ended with code {self._process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"killed after --limit {self._limit_s:g} s"
        finally:
            self._end()
        found, lines = {}, self._lines()
        for text in lines:
            if text.startswith(RESULT):
                found |= json.loads(text.removeprefix(RESULT))
            elif "sparse attention" in text or "GPU KV cache size" in text or "Error" in text:
                print(text, file=sys.stderr)
        if reason:
            print(*lines[-LOG_TAIL_LINES:], sep="\n", file=sys.stderr)
            found["reason"] = reason
        return found

    def _lines(self) -> list[str]:
        return Path(self._log.name).read_text(errors="replace").splitlines()

    def _end(self) -> None:
        deadline = time.monotonic() + GONE_TIMEOUT_S
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                time.sleep(0.1)

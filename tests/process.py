"""Processes that tests start, and never leave behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list, log: Path, **environment: str | None):
    """Run ``command`` with output to ``log``; at the end it is gone, and all that it spawned.

    ``environment`` changes this process's; None removes a variable.
    """
    merged = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=merged,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            # The group outlives its leader while a child of it runs.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)

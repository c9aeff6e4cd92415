"""The command `vllm-sparse`."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Sequence

from vllm_sparse import __version__
from vllm_sparse.errors import ConfigError
from vllm_sparse.tools import check, plan
from vllm_sparse.tools.commands import Parser
from vllm_sparse.tools.eval import command as evaluate
from vllm_sparse.tools.tune import command as tune

CONTINUE = (evaluate.run, tune.run)
"""Commands that keep what they measured until they were interrupted."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="vllm-sparse", description="Page-sparse attention for vLLM.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tune.add_command(commands)
    evaluate.add_command(commands)
    plan.add_command(commands)
    check.add_command(commands)
    # None: closed by who started this.
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:  # a path may hold what the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    arguments = None
    try:
        try:
            arguments = parser.parse_args(argv)
            return arguments.run(arguments) or 0
        finally:  # Python's own flush at the end tells of failures on many lines
            for stream in streams:
                stream.flush()
    except ConfigError as error:
        print(f"vllm-sparse: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; the same command continues there" if getattr(arguments, "run", None) in CONTINUE else ""
        print(f"\nvllm-sparse: interrupted{again}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():  # `| head` has read enough
            _discard_stdout()
            return 128 + signal.SIGPIPE
        if error.errno not in FULL:
            raise
        _discard_stdout()
        print(f"vllm-sparse: cannot write: {error}", file=sys.stderr)
        return 1


def _nobody_reads_stdout() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard_stdout() -> None:
    """Have Python write nowhere what it would try to write at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())

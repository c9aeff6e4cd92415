"""The command `vllm-sparse`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools import check, plan
from vllm_sparse.tools.commands import Parser
from vllm_sparse.tools.eval import command as evaluate
from vllm_sparse.tools.tune import command as tune


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="vllm-sparse", description="Page-sparse attention for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tune.add_command(commands)
    evaluate.add_command(commands)
    plan.add_command(commands)
    check.add_command(commands)
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        return arguments.run(arguments) or 0
    except ConfigError as error:
        print(f"vllm-sparse: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

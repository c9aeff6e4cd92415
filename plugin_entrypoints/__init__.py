"""vLLM's ``general_plugins`` entry point."""

from __future__ import annotations


def register() -> None:
    """Make ``--attention-backend sparse`` known; called by vLLM in every process, any number of times.

    Until that name is asked for, nothing in vLLM behaves differently.
    """
    from vllm_sparse.backend import compat

    compat.install()

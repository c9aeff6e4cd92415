"""The tasks by name, names of several, and old names that still work."""

from __future__ import annotations

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.eval import many_turns, mrcr, qa, ruler, trace
from vllm_sparse.tools.eval.problems import Task

TEXT, PREFILL_TEXT = "text", "prefill_text"
"""The tasks that score a text's own tokens: the last ones in decode steps, nearly all in prefill."""
LOSSES = (TEXT, PREFILL_TEXT)
"""Tasks whose rows have a loss in nats, where those of the others have a score."""
PROBLEMS: dict[str, Task] = {**ruler.TASKS, **qa.TASKS, **mrcr.TASKS, **many_turns.TASKS, **trace.TASKS}
TASKS = (*LOSSES, *PROBLEMS)
RENAMED = {"niah_single": "niah_single_2", "niah_multikey": "niah_multikey_1"}
"""Names of before there were all of RULER's, as old rows have them: the same prompts."""
OLD_NAMES = {new: old for old, new in RENAMED.items()}
GROUPS = {
    "ruler": (*ruler.TASKS, *qa.TASKS),
    "mrcr": tuple(mrcr.TASKS),
    "trace": tuple(trace.TASKS),
    "all": (TEXT, *PROBLEMS),
}
"""Names of several tasks; of those that need a file that was not given they mean the others."""


def named(names: list[str], files: set[str]) -> list[str]:
    """The tasks that ``names`` of tasks and groups mean, each once; ``files``: the options that were given.

    Raises:
        ConfigError: there is no such name, or a task that was named itself lacks its file.
    """
    found: list[str] = []
    for name in names:
        if name not in TASKS and name not in RENAMED and name not in GROUPS:
            raise ConfigError(
                f"--tasks: {name!r}; allowed: {', '.join(dict.fromkeys((*TASKS, *GROUPS, *RENAMED)))}"
            )
        for task in GROUPS.get(name, (RENAMED.get(name, name),)):
            needs = "text" if task in LOSSES else PROBLEMS[task].needs
            if needs == "text" or needs in files:
                found.append(task)
            elif name not in GROUPS:
                raise ConfigError(f"--tasks: {task} is made from a file; allowed with --{needs} FILE")
    return list(dict.fromkeys(found))

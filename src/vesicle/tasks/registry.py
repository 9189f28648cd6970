"""The tasks by name. Nothing of a task is loaded before it is asked for."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from vesicle.errors import VesicleError
from vesicle.tasks.base import Task

TASKS: dict[str, str] = {
    "squad": "vesicle.tasks.squad:Squad",
    "race": "vesicle.tasks.race:Race",
    "cnn_dailymail": "vesicle.tasks.cnn_dailymail:CnnDailyMail",
    "wikitext2": "vesicle.tasks.wikitext:WikiText2",
    "wikitext103": "vesicle.tasks.wikitext:WikiText103",
    "wmt14_en_de": "vesicle.tasks.wmt14:Wmt14EnDe",
    "arxiv": "vesicle.tasks.arxiv:Arxiv",
    "longbench": "vesicle.tasks.longbench:LongBench",
    "needle": "vesicle.tasks.needle:Needle",
    "ruler": "vesicle.tasks.ruler:Ruler",
    "briefing": "vesicle.tasks.briefing:Briefing",
    "instructions": "vesicle.tasks.instructions:Instructions",
}
"""Module and class of each task."""


def task_names() -> list[str]:
    """All names that `find_task` knows, in the order of the docs."""
    return list(TASKS)


def find_task(name: str) -> Task:
    """Load a task.

    Args:
        name: Such as `squad`.

    Returns:
        A new task.

    Raises:
        VesicleError: There is no such task; near matches and all names are told.
    """
    if name not in TASKS:
        near = get_close_matches(name.lower().replace("-", "_"), TASKS, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise VesicleError(f"unknown task {name!r}; {hint}allowed: {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    task: Task = getattr(import_module(module), kind)()
    return task

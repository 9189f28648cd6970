"""TaskConfig: what `vesicle eval` is asked for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vesicle.errors import VesicleError
from vesicle.evaluation.methods.names import BESIDE_ORACLE, ORACLE, check_methods
from vesicle.evaluation.report.results import ORACLE_PART, Key
from vesicle.evaluation.run.settings import as_json, check_whole, sorted_budgets
from vesicle.phases import Phases
from vesicle.tasks.base import Task
from vesicle.tasks.registry import find_task, task_names

DIALS = ("tuned", "shipped")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What to evaluate.

    Attributes:
        tasks: Names, see `vesicle.tasks.registry`.
        methods: See `vesicle.evaluation.methods.names`.
        budgets: Shares of the dense FLOPs, each in (0, 1].
        data: A folder in the local format, `sample`, or None for the hub.
        split: Which part of the data; None for each task's own.
        limit: Items of a task, drawn at random; windows of a text, evenly spread; None for all.
        seed: Of draws, generated items, random controls and bootstraps.
        max_length: Most tokens of prompt and answer together; None for the context window.
        window: Tokens in a window of a text; None for the task's own.
        context: Tokens at the head of each window that are a prompt: read, and not scored.
        lengths: Prompt lengths of generated tasks; () for their own.
        depths: Depths of generated tasks; () for their own.
        per_cell: Items of each length and depth of generated tasks; None for their own.
        dial: `tuned` on the task's prompts, or `shipped`: as the modulator was calibrated.
        best_of: Random tables that `best-of-n` tries.
        selection: Items on which it selects: the first ones.
        oracle_windows: Windows of a text that the oracle searches on, spread evenly.
        oracle_length: Their tokens, from the beginning.
        phases: On which tokens the modulator and the controls act, as `Phases.parse` reads it.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("learnt",)
    budgets: tuple[float, ...] = (1.0,)
    data: str | None = None
    split: str | None = None
    limit: int | None = 50
    seed: int = 0
    max_length: int | None = None
    window: int | None = None
    context: int = 0
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    per_cell: int | None = None
    dial: str = "tuned"
    best_of: int = 20
    selection: int = 4
    oracle_windows: int = 2
    oracle_length: int = 512
    phases: tuple[str, ...] = ()

    @property
    def acts(self) -> Phases:
        """On which tokens each transmitter acts: `phases`, parsed."""
        return Phases.parse(self.phases)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        least = {
            "limit": 1,
            "seed": 0,
            "max_length": 16,
            "window": 2,
            "context": 0,
            "per_cell": 1,
            "best_of": 1,
            "selection": 1,
            "oracle_windows": 1,
            "oracle_length": 2,
        }
        check_whole(self, least, optional=("limit", "max_length", "window", "per_cell"))
        if any(n < 16 for n in self.lengths):
            raise VesicleError(f"lengths is {min(self.lengths)}; allowed: 16 tokens and more")
        if any(not 0 <= d <= 1 for d in self.depths):
            raise VesicleError(f"depths is {self.depths}; allowed: from 0 to 1")
        if self.dial not in DIALS:
            raise VesicleError(f"dial is {self.dial!r}; allowed: {', '.join(DIALS)}")
        if not self.tasks:
            raise VesicleError("no task is named")
        Phases.parse(self.phases)
        for name in self.tasks:
            self._check_text(find_task(name))
        set_ = object.__setattr__
        set_(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        set_(self, "methods", check_methods(self.methods))
        set_(self, "budgets", sorted_budgets(self.budgets))

    def _check_text(self, task: Task) -> None:
        """Refuse what is about a text's windows where a task has none."""
        texts = ", ".join(name for name in task_names() if find_task(name).kind == "loss")
        if ORACLE in self.methods and task.kind != "loss":
            raise VesicleError(
                f"method {ORACLE!r} searches the windows of a text, and task {task.name!r} has "
                f"none; allowed with it: {texts}"
            )
        if self.context and task.kind != "loss":
            raise VesicleError(
                f"context is {self.context}, tokens of a text's windows, and task {task.name!r} "
                f"has none; allowed with it: {texts}"
            )
        if self.context and ORACLE in self.methods:
            raise VesicleError(
                f"context is {self.context}; allowed with method {ORACLE!r}: 0, since it searches "
                "windows that are scored whole"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it; of a local folder the name alone."""
        return as_json(self)

    def oracle_keys(self, task: str) -> list[Key]:
        """The rows of a text's few windows on which the oracle searches; none without it."""
        budgets = [budget for budget in self.budgets if budget < 1]
        if ORACLE not in self.methods or not budgets:
            return []
        few = task + ORACLE_PART
        beside = [m for m in self.methods if m in (*BESIDE_ORACLE, ORACLE)]
        return [(few, "dense", 1.0), *((few, m, budget) for budget in budgets for m in beside)]

    def keys(self, task: str) -> list[Key]:
        """The rows of a task, in the order they are run in; at a budget of 1 all are dense."""
        keys: list[Key] = [(task, "dense", 1.0)]
        for budget in self.budgets:
            if budget < 1:
                keys += [(task, m, budget) for m in self.methods if m not in ("dense", ORACLE)]
        return keys

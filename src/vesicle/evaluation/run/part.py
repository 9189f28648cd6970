"""Part: what has a table of its own: items, and the rows that are run on them.

A task is one part. A text on which the oracle searches has a second one, of few, short windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vesicle.evaluation.execution.items import Prepared, prepare, window
from vesicle.evaluation.execution.language_modelling import evenly
from vesicle.evaluation.execution.prompts import Codec
from vesicle.evaluation.report.results import Key
from vesicle.evaluation.report.rows import facts_of
from vesicle.evaluation.run.notices import Say
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.tasks.base import Settings, Task
from vesicle.tasks.items import Missing
from vesicle.tasks.registry import find_task
from vesicle.tasks.sources import Loaded, load_items

_NAMED = 5
"""Missing items that are told one by one; the record has them all."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Items with the rows that are run on them.

    Attributes:
        name: As keys have it.
        title: As a heading.
        task: What is asked and scored.
        loaded: Where the items are from.
        items: To be run.
        unfit: Items that cannot be.
        keys: Of the rows, in the order in which they are run; the dense one first.
        exact: Whether the dial is turned on all items, and controls are scaled to the budget;
            else the dial is turned on a few, and controls are scaled to what it gave.
        selection_length: Tokens of the windows on which best-of-n selects; None for all.
        settings: What else decides the numbers, as JSON.
    """

    name: str
    title: str
    task: Task
    loaded: Loaded
    items: list[Prepared]
    keys: list[Key]
    unfit: list[Missing] = field(default_factory=list)
    exact: bool = False
    selection_length: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> Key:
        """The row of the model itself."""
        return (self.name, "dense", 1.0)

    @property
    def methods(self) -> frozenset[str]:
        """Those that have rows."""
        return frozenset(method for _, method, _ in self.keys)

    @property
    def n_tokens(self) -> int:
        """Tokens of one row, answers as long as they may be."""
        return sum(p.n_most for p in self.items)

    def facts(self) -> dict[str, Any]:
        """What the record says of the task: one entry of `TaskResult.tasks`."""
        task = self.task
        return {
            "name": self.name,
            "title": self.title,
            "kind": task.kind,
            "style": task.style,
            "split": self.loaded.split,
            "data": self.loaded.description,
            "sha256": self.loaded.sha256,
            "n_items": len(self.items),
            "n_rows": self.loaded.n_rows,
            "missing": [asdict(one) for one in (*self.loaded.missing, *self.unfit)],
            "prompt_tokens": sum(len(p.prompt.ids) for p in self.items),
            "shortened": sum(p.prompt.shortened > 0 for p in self.items),
            "metrics": [facts_of(m) for m in task.metrics],
        }

    def tell_missing(self, speak: Say) -> None:
        """Name what cannot be asked, before anything is run."""
        rows, place = self.loaded.missing, self.loaded.place
        if rows:
            speak(
                f"{self.name}: {len(rows)} of {self.loaded.n_rows} rows of {place} cannot be "
                "asked and are left out"
            )
        tell_items(speak, place, rows)
        if self.unfit:
            n = len(self.unfit)
            speak(f"{self.name}: {n} of {n + len(self.items)} items are left out")
        tell_items(speak, f"{self.name} item", self.unfit)


def part_of(name: str, subject: Subject, config: TaskConfig) -> Part:
    """The items of a task.

    Raises:
        DataError: Data are missing or empty, or no item can be asked.
    """
    task, codec = find_task(name), subject.codec
    settings = Settings(
        seed=config.seed,
        encode=lambda text: codec.encode(text, control_tokens=False),
        lengths=config.lengths,
        depths=config.depths,
        per_cell=config.per_cell,
    )
    loaded = load_items(
        task, data=config.data, split=config.split, settings=settings, limit=config.limit
    )
    most = subject.executor.context_window
    items, unfit = prepare(
        task,
        loaded.items,
        codec,
        min(config.max_length or most, most),
        length=config.window,
        context=config.context,
        limit=config.limit,
    )
    return Part(
        name=name,
        title=task.title,
        task=task,
        loaded=loaded,
        items=items,
        unfit=unfit,
        keys=config.keys(name),
        settings={"context": config.context},
    )


def oracle_part(whole: Part, keys: list[Key], n: int, length: int, codec: Codec) -> Part:
    """The windows on which the oracle searches.

    Args:
        whole: The text.
        keys: Its rows.
        n: Windows, spread evenly over those of the text.
        length: Their tokens, from the beginning.
        codec: The model's text side.
    """
    few = [whole.items[i] for i in evenly(len(whole.items), n)]
    items = [window(p.item.id, p.prompt.ids[:length], codec) for p in few]
    loaded = whole.loaded
    description = f"{loaded.description}; the beginnings of {len(items)} windows"
    return replace(
        whole,
        name=keys[0][0],
        title=f"{whole.title}, the oracle's windows",
        loaded=replace(loaded, description=description, missing=()),
        items=items,
        unfit=[],
        keys=keys,
        exact=True,
    )


def tell_items(say: Say, where: str, missing: Sequence[Missing]) -> None:
    """Name the first missing items."""
    for one in missing[:_NAMED]:
        say(f"{where} {one}")
    if len(missing) > _NAMED:
        say(f"{where}: and {len(missing) - _NAMED} more, which the record lists")

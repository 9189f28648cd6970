"""TaskResult: the record of an evaluation, with units and provenance; one JSON file a run.

Everything but what lies under `measured` (seconds, peak memory) follows from settings, data, model
and seed: a run that was killed and went on writes the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from vesicle.records import Record, checked

SCHEMA = "vesicle-tasks-1"

Key = tuple[str, str, float]
"""Task, method, budget."""

TEXT = "text"
"""The task's name in keys where `vesicle regret` evaluates any text."""

ORACLE_PART = "-oracle"
"""How the names of those parts of a task end on which the oracle searches."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a row.

    Intervals are 95 % bootstrap intervals over items, None for few items. Differences are paired.

    Attributes:
        value: In the metric's unit: percent, but for perplexity and bits per byte.
        low: Lower end of its interval.
        high: Upper end.
        delta: Less the dense model's value on the same items.
        delta_low: Lower end of that difference's interval.
        delta_high: Upper end.
        learnt: The learnt modulator's value at this budget less this one; None where there is none.
        learnt_low: Lower end.
        learnt_high: Upper end.
    """

    value: float
    low: float | None
    high: float | None
    delta: float
    delta_low: float | None
    delta_high: float | None
    learnt: float | None = None
    learnt_low: float | None = None
    learnt_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One method at one budget on one task.

    Attributes:
        task: Its name.
        method: As in `methods.NAMES`, or a press.
        budget: Asked share of the dense FLOPs; of a press, the share of entries kept.
        n_items: Items scored.
        scores: By metric.
        executed: `prefill`, `decode` and `total`, each a `Cost` as JSON summed over items;
            `kv_bytes_held` is the mean over items of what was held at the end of the phase.
        dense: The same for the dense model on the same tokens.
        ratio: Executed over dense, of the total: `flops`, `weight_bytes`, `kv_bytes_read`,
            `kv_bytes_held`, `bytes_read`.
        measured: `seconds` by phase over all items and of `setting` the method (absent in old
            records), and the largest `peak_bytes` of the process.
        items: (n_items,) each: `ids`, `statistics` by metric, executed `flops` and `dense_flops`,
            `prompt_tokens`, `answer_tokens`; and those that could not be run, `missing`, each with
            `item` and `reason` (absent in old records).
        details: What the method was set to.
        shares: Executed share of the dense FLOPs of each phase, `prompt` and `generated`; empty in
            records of before there were phases, when every token was governed.
    """

    task: str
    method: str
    budget: float
    n_items: int
    scores: dict[str, Score]
    executed: dict[str, dict[str, float]]
    dense: dict[str, dict[str, float]]
    ratio: dict[str, float]
    measured: dict[str, Any]
    items: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What identifies a row within a run."""
        return (self.task, self.method, self.budget)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            DataError: A field is missing or unknown.
        """
        known = checked(cls, {"shares": {}, **values}, "an evaluation")
        scores = {
            name: Score(**checked(Score, s, "an evaluation")) for name, s in known["scores"].items()
        }
        return cls(**{**known, "scores": scores})


@dataclass(frozen=True, kw_only=True)
class TaskResult(Record):
    """A run.

    Attributes:
        config: What was asked for, as JSON.
        config_hash: Identifies settings, data, model, modulator and versions together.
        seed: Of everything random.
        versions: Of this package and of what decides its numbers.
        hardware: CPU model, cores and threads.
        model: Name, sizes, fingerprint and number formats.
        modulator: Name, kind and fingerprint; empty without one.
        tasks: For each task: `name`, `title`, `kind`, `style`, `split`, `data`, `sha256`,
            `n_items`, `shortened` (prompts that lost a part of their context), `n_rows` of the data
            and `missing` (rows and items that could not be asked, each with `item` and `reason`)
            and `metrics`, each with `name`, `title`, `percent`, `digits`,
            `higher_is_better` and `signature`.
        rows: By task, budget (falling) and method.
        missing: Rows that could not be had, each with `task`, `method`, `budget` and `reason`.
    """

    what = "an evaluation"
    version = SCHEMA
    indent = None  # the numbers of each item would fill thousands of lines

    config: dict[str, Any]
    config_hash: str
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, Any]
    modulator: dict[str, Any]
    tasks: list[dict[str, Any]]
    rows: list[TaskRow]
    missing: list[dict[str, Any]] = field(default_factory=list)

    @property
    def decider(self) -> str:
        """What the modulator is called, and whether it previews the LM head; `none` for none."""
        gaba = self.modulator.get("effectors", {}).get("gaba", {})
        previews = ", which previews the LM head" if gaba.get("logits") else ""
        return str(self.modulator.get("name", "none")) + previews

    def find(self, task: str, method: str, budget: float) -> TaskRow:
        """A row.

        Raises:
            KeyError: If there is none.
        """
        for row in self.rows:
            if row.key == (task, method, budget):
                return row
        raise KeyError(f"no row for {method} at {budget} on {task}")

    def of_task(self, task: str) -> list[TaskRow]:
        """The rows of a task, in the order of `rows`."""
        return [row for row in self.rows if row.task == task]

    @classmethod
    def parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rows are records of their own."""
        return {**values, "rows": [TaskRow.from_dict(row) for row in values["rows"]]}

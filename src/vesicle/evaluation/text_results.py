"""Result: the record of an evaluation, with units and provenance; written as one JSON file.

A row is one method at one budget on one set of windows. Losses are compared window by window: with
d_w the difference between two methods' mean losses on window w, the difference that is reported is
mean(d_w), its standard error std(d_w) / sqrt(N), and its interval that of the percentile bootstrap
over windows (`vesicle.tasks.metrics.bootstrap`). The interval is about the choice of text alone,
not about training seeds or random controls' seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from vesicle.evaluation.evaluation_record import Evaluation
from vesicle.plan import FloatArray
from vesicle.records import checked
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import Metric
from vesicle.tasks.metrics.bootstrap import interval

SCHEMA = "vesicle-evaluation-1"
DRAWS = 10_000

Key = tuple[str, str, float]
"""Method, subset, budget."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference between two methods.

    Attributes:
        mean: In the unit of what was compared.
        standard_error: Over windows; None for a single window.
        low: Lower end of the 95 % bootstrap interval; None for fewer than `FEWEST` windows.
        high: Upper end.
    """

    mean: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


def paired_difference(
    a: Sequence[float] | FloatArray, b: Sequence[float] | FloatArray, seed: int = 0
) -> Difference:
    """The mean of a - b with its uncertainty; see the module docstring.

    Args:
        a: (N,) one number a window.
        b: (N,) the other method on the same windows.
        seed: Of the bootstrap's draws.

    Raises:
        ValueError: If the lengths differ or are 0.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"cannot pair {len(a)} windows with {len(b)}; equal and above 0 is needed")
    d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    found = interval(_Mean(), np.stack([d, np.ones(len(d))], axis=1), seed, DRAWS)
    error = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else None
    return Difference(mean=found.value, standard_error=error, low=found.low, high=found.high)


class _Mean(Metric):
    """A plain mean, from sums of numbers and of ones."""

    name = title = "mean"

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        return (output.nats, 1.0)

    def value(self, sums: FloatArray) -> float:
        return float(sums[0] / sums[1])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget.

    Attributes:
        method: As in `methods.NAMES`.
        subset: `all` windows, or `oracle`: the fewer, shorter windows on which the oracle is
        affordable.
        budget: Asked share of the dense FLOPs.
        cost_share: Executed FLOPs as a share of the dense model's on the same windows, everything
            counted: LM head, stand-ins, block selection and the modulator's own work.
        loss_nats: Mean loss in nats per scored token.
        delta_nats: The same less the dense model's.
        delta_se_nats: Standard error of `delta_nats` over windows; None for one window.
        delta_low_nats: Lower end of its 95 % interval; None for fewer than `FEWEST` windows.
        delta_high_nats: Upper end.
        bits_per_byte: Loss in bits per UTF-8 byte of the scored text.
        n_windows: Windows, each a fresh sequence.
        n_tokens: Tokens scored, over all windows; a window's first token is not.
        seconds: Wall-clock time of the row, tuning and search included.
        window_nats: (n_windows,) mean loss of each window, for paired comparisons between rows.
        details: What the method was set to: the dial, a scale, a table.
    """

    method: str
    subset: str
    budget: float
    cost_share: float
    loss_nats: float
    delta_nats: float
    delta_se_nats: float | None
    delta_low_nats: float | None
    delta_high_nats: float | None
    bits_per_byte: float
    n_windows: int
    n_tokens: int
    seconds: float
    window_nats: list[float]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What identifies a row within one evaluation."""
        return (self.method, self.subset, self.budget)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            DataError: A field is missing or unknown.
        """
        return cls(**checked(cls, values, "an evaluation"))


@dataclass(frozen=True, kw_only=True)
class Result(Evaluation):
    """An evaluation of a text.

    Attributes:
        data: Description, SHA-256 of the tokens, and counts.
        rows: By subset, budget (falling) and method.
        missing: Rows that could not be had, each with `method`, `subset`, `budget` and `reason`.
    """

    version = SCHEMA

    data: dict[str, Any]
    rows: list[Row]
    missing: list[dict[str, Any]] = field(default_factory=list)

    def find(self, method: str, budget: float, subset: str = "all") -> Row:
        """The row of a method.

        Raises:
            KeyError: If there is none.
        """
        for row in self.rows:
            if row.key == (method, subset, budget):
                return row
        raise KeyError(f"no row for {method} at {budget} on {subset} windows")

    def against_learnt(self, row: Row) -> Difference | None:
        """Loss of a row less that of `learnt` at its budget and windows, in nats per token.

        Positive: the learnt levels are better. None if there is nothing to compare.
        """
        if row.method in ("learnt", "dense"):
            return None
        try:
            learnt = self.find("learnt", row.budget, row.subset)
        except KeyError:
            return None
        return paired_difference(row.window_nats, learnt.window_nats, self.seed)

    @classmethod
    def parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rows are records of their own."""
        return {**values, "rows": [Row.from_dict(row) for row in values["rows"]]}

"""Measures of bases side by side, over seeds or windows, and what their differences bear out.

An interval is that of a bootstrap over the units, which are paired: all bases are measured on the
same seeds and windows. With three seeds it is hardly more than their range, and too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from vesicle.intervals import interval
from vesicle.records import Record

LIB, PCA, SCALED, RANDOM = "lib", "pca", "pca-scaled", "random"
CONTROLS = (PCA, SCALED, RANDOM)
HIGHER_IS_SPARSER = ("gini",)
"""Of all other measures lower values are sparser, or need less."""

Table = Mapping[str, Mapping[str, Sequence[float]]]
"""Values of each unit, by basis and measure."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: Over units.
        low: Where its 95 % interval begins.
        high: Where that ends.
        values: One a unit.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Measures of one pair of adjacent layers.

    Attributes:
        source: Name of the layer before.
        target: Name of the layer after it.
        n_source: Features of the one.
        n_target: Features of the other.
        bases: Estimates by basis and measure.
        less: The Local Interaction Basis less each control, paired, by control and measure.
    """

    source: str
    target: str
    n_source: int
    n_target: int
    bases: dict[str, dict[str, Estimate]]
    less: dict[str, dict[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class BasisReport(Record):
    """What was found.

    Attributes:
        subject: `modular` or the model's name.
        unit: What is drawn for intervals, `seed` or `window`.
        settings: Of the run.
        facts: What else was measured, such as the accuracy of networks trained.
        compared: A pair of layers each.
    """

    what: ClassVar[str] = "basis report"
    version: ClassVar[str] = "vesicle-basis-1"

    subject: str
    unit: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    compared: tuple[Compared, ...]

    def verdicts(self, control: str = PCA) -> dict[str, dict[str, str]]:
        """By pair of layers and measure, what the Local Interaction Basis is beside a control."""
        return {
            f"{pair.source} to {pair.target}": {
                measure: verdict(measure, found) for measure, found in pair.less[control].items()
            }
            for pair in self.compared
        }

    @classmethod
    def parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields from those of JSON."""
        return {**values, "compared": tuple(_compared(pair) for pair in values["compared"])}


def compare(values: Table, *, source: str, target: str, n_source: int, n_target: int) -> Compared:
    """Estimates of all bases and of their differences.

    Args:
        values: Of each unit, in the same order for all bases.
        source: Name of the layer before.
        target: Name of the layer after it.
        n_source: Features of the one.
        n_target: Features of the other.
    """
    lib = values[LIB]
    return Compared(
        source=source,
        target=target,
        n_source=n_source,
        n_target=n_target,
        bases={
            basis: {measure: estimate(row) for measure, row in rows.items()}
            for basis, rows in values.items()
        },
        less={
            control: {
                measure: estimate(np.subtract(lib[measure], row).tolist())
                for measure, row in values[control].items()
            }
            for control in CONTROLS
        },
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of units, and a bootstrap interval of 95 %; the same values give the same.

    Raises:
        ValueError: There are none.
    """
    if not len(values):
        raise ValueError("there are no values; allowed: one and more")
    given = np.array(values, dtype=float)
    low, high = interval(given)
    return Estimate(
        mean=_rounded(given.mean()),
        low=_rounded(low),
        high=_rounded(high),
        values=tuple(map(_rounded, given)),
    )


def verdict(measure: str, less: Estimate) -> str:
    """`sparser`, `denser` or `not told apart`: the Local Interaction Basis beside a control.

    Args:
        measure: Its name.
        less: That of the Local Interaction Basis less that of a control.
    """
    side = -1 if measure in HIGHER_IS_SPARSER else 1
    low, high = sorted((side * less.low, side * less.high))
    if high < 0:
        return "sparser"
    return "denser" if low > 0 else "not told apart"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _compared(pair: dict[str, Any]) -> Compared:
    tables = {
        name: {
            basis: {
                measure: Estimate(**{**found, "values": tuple(found["values"])})
                for measure, found in rows.items()
            }
            for basis, rows in pair[name].items()
        }
        for name in ("bases", "less")
    }
    return Compared(**{**pair, **tables})


def as_values(rows: Sequence[Any]) -> dict[str, list[float]]:
    """Values by measure, of one dataclass a unit."""
    names = list(asdict(rows[0]))
    return {name: [float(getattr(row, name)) for row in rows] for name in names}

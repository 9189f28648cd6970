"""What was published, what was found here, and whether that bears it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vesicle.intervals import interval

HOLDS, FAILS, UNTOLD = "reproduced", "not reproduced", "not told apart from 0"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: Of the units.
        low: Lower end; from a bootstrap over units.
        high: Upper end.
        n: Units, such as facts, relations or sentences.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published claim.

    Attributes:
        name: In a word or two.
        published: What was said.
        measured: What the number is.
        found: The number; above 0 it is for the claim.
        control: What stands beside it, in words and figures.
        verdict: `HOLDS` where all of the interval is above 0, `FAILS` where all of it is below.
    """

    name: str
    published: str
    measured: str
    found: Estimate
    control: str
    verdict: str


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of units (N,), N at least 1, and its interval."""
    units = np.asarray(values, dtype=float)
    low, high = interval(units)
    return Estimate(mean=float(units.mean()), low=low, high=high, n=len(units))


def verdict(found: Estimate) -> str:
    """Whether an estimate lies above 0."""
    if found.low > 0:
        return HOLDS
    return FAILS if found.high < 0 else UNTOLD


def told(found: Estimate) -> str:
    """An estimate in figures."""
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"

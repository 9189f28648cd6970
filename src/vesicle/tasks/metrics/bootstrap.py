"""Bootstrap: how far a metric would move with other items of the same kind.

The percentile bootstrap (Efron & Tibshirani 1993, chapter 13): draw as many items as there are,
with replacement, a few thousand times; the interval runs from the 2.5 % to the 97.5 % quantile of
the metric over draws. A metric is a function of summed statistics (`vesicle.tasks.metrics.base`),
so a draw is a row of counts times the statistics, and nothing is scored again. Two methods on the
same items are compared under the same draws: what makes an item hard for both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vesicle.plan import FloatArray
from vesicle.tasks.metrics.base import Metric

DRAWS = 2000
FEWEST = 5
"""Items below which an interval would mislead, so that none is given."""
CELLS = 2**21
"""Counts held at a time, over draws and items."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: Of the items as they are, in the metric's own unit.
        low: Lower end; None for fewer than `FEWEST` items.
        high: Upper end; likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None


def interval(metric: Metric, statistics: FloatArray, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """A metric with its interval.

    Args:
        metric: What makes the number.
        statistics: (N, S) each item's own, in a fixed order.
        seed: Of the draws.
        draws: How often items are drawn.

    Raises:
        ValueError: There are no items.
    """
    table = _checked(statistics)
    value = metric.value(_total(table))
    if len(table) < FEWEST:
        return Estimate(value)
    return _estimate(value, [metric.value(sums) for sums in _drawn(table, seed, draws)])


def paired(
    metric: Metric, a: FloatArray, b: FloatArray, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """The difference a - b of a metric between two methods on the same items.

    Args:
        metric: What makes the numbers.
        a: (N, S) statistics of one method.
        b: (N, S) of the other, of the same items in the same order.
        seed: Of the draws, which are the same for both.
        draws: How often items are drawn.

    Raises:
        ValueError: There are no items, or shapes differ.
    """
    first, second = _checked(a), _checked(b)
    if first.shape != second.shape:
        raise ValueError(f"cannot pair statistics of shape {first.shape} with {second.shape}")
    value = metric.value(_total(first)) - metric.value(_total(second))
    if len(first) < FEWEST:
        return Estimate(value)
    both = zip(_drawn(first, seed, draws), _drawn(second, seed, draws), strict=True)
    return _estimate(value, [metric.value(x) - metric.value(y) for x, y in both])


def _checked(statistics: FloatArray) -> FloatArray:
    table = np.asarray(statistics, np.float64)
    if table.ndim != 2 or len(table) == 0:
        raise ValueError(f"statistics of shape {table.shape}; (items, numbers) is needed")
    return table


def _total(table: FloatArray) -> FloatArray:
    """Sums over items (S,), rounded once, so that the order of items cannot show."""
    return np.array([math.fsum(column) for column in table.T])


def _drawn(table: FloatArray, seed: int, draws: int) -> Iterator[FloatArray]:
    """Sums (S,) of each draw: multinomial counts of items, times their statistics."""
    n = len(table)
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // n)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        # Each draw's items, moved to a range of its own, so that one bincount serves all draws.
        picked = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(picked.ravel(), minlength=rows * n).reshape(rows, n)
        yield from counts.astype(np.float64) @ table


def _estimate(value: float, drawn: list[float]) -> Estimate:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))

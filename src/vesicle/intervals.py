"""Intervals of means, by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13)."""

from __future__ import annotations

import numpy as np

_DRAWS = 2000


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the means of values drawn with replacement; the same values give the same.

    Args:
        values: (N,), of each text say, N at least 1.
    """
    drawn = np.random.default_rng(0).integers(0, len(values), (_DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)

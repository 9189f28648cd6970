"""Means over items and seeds, with bootstrap intervals that hold for differences, too.

All that is compared is drawn with the same weights of the same items, so that a difference of two
estimates is paired (Efron and Tibshirani 1993). Intervals are over items (games, texts); how far
seeds differ is told apart. F1 is no mean, and the draws of it lie a little off it; they are moved
so that their mean is the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.neurons.experts.coverage import f1_of

_DRAWS = 1000
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "not told apart from 0"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over items and seeds.

    Attributes:
        by_seed: Of each seed.
        drawn: Of each draw of items, the mean over seeds.
    """

    by_seed: tuple[float, ...]
    drawn: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.by_seed))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        centred = self.drawn - self.drawn.mean() + self.mean
        low, high = np.quantile(centred, [0.025, 0.975])
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference.

        Raises:
            ValueError: They are of other numbers of seeds.
        """
        pairs = zip(self.by_seed, other.by_seed, strict=True)
        return Estimate(by_seed=tuple(a - b for a, b in pairs), drawn=self.drawn - other.drawn)

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        low, high = self.interval
        return {
            "mean": round(self.mean, 5),
            "low": round(low, 5),
            "high": round(high, 5),
            "by_seed": [round(value, 5) for value in self.by_seed],
        }

    def verdict(self, side: int) -> str:
        """Whether it lies above 0 (side 1) or below it (side -1): all of the interval, or none."""
        low, high = sorted(side * end for end in self.interval)
        if low > 0:
            return HOLDS
        return FAILS if high < 0 else UNTOLD


def of_means(values: Sequence[Tensor]) -> Estimate:
    """Of the mean of items.

    Args:
        values: Of each seed, (I,).
    """
    weights = _weights(len(values[0]))
    rows = [value.double().numpy() for value in values]
    drawn = np.mean([weights @ row / len(row) for row in rows], 0)
    return Estimate(by_seed=tuple(float(row.mean()) for row in rows), drawn=drawn)


def of_counts(counts: Sequence[Tensor]) -> Estimate:
    """Of coverage: the mean F1 of P properties.

    Args:
        counts: Of each seed, (J, P, 3) true positives, false positives and false negatives.
    """
    weights = torch.from_numpy(_weights(len(counts[0])))
    drawn = []
    for each in counts:
        summed = weights @ each.double().flatten(1)  # (draws, 3 P)
        drawn.append(f1_of(summed.view(len(summed), *each.shape[1:])).mean(1).numpy())
    by_seed = tuple(float(f1_of(each.sum(0)).mean()) for each in counts)
    return Estimate(by_seed=by_seed, drawn=np.mean(drawn, 0))


def _weights(n_items: int) -> NDArray[np.float64]:
    """(draws, I) how often each item is drawn; the same for the same number of items."""
    rng = np.random.default_rng(0)
    return rng.multinomial(n_items, [1 / n_items] * n_items, _DRAWS).astype(np.float64)

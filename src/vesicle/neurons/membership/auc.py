"""AUC: how often a member scores above a document that is none, with bootstrap intervals.

    AUC = P(score of a member > score of another) + P(they are equal) / 2

Scores of different folds come from different classifiers and are not compared: the AUC is the mean
of the AUCs within folds, and of several runs the mean over runs. Members are half of every fold,
drawn at random, so that the mean of whatever knows nothing of them is 0.5 exactly.

The interval of 95 % draws documents with replacement, the same in every run and for both sides of a
difference. Classifiers are not trained again, so that it tells how far other documents would move
the number, and nothing of how far other trainings would; runs are told one by one for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FloatArray

DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Area:
    """An AUC, or a difference of two, with its interval of 95 %."""

    value: float
    low: float
    high: float

    def row(self) -> dict[str, float]:
        """As reports have it."""
        return {"auc": _round(self.value), "low": _round(self.low), "high": _round(self.high)}


def auc(scores: FloatArray, labels: NDArray[np.bool_]) -> float:
    """The AUC of scores (N,) for labels (N,), true for members.

    Raises:
        ValueError: If there are no members, or no others.
    """
    _check(labels)
    return float(_weighted(scores, labels, np.ones((1, len(scores))))[0])


def estimate(
    scores: FloatArray,
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Area:
    """The mean AUC of runs, with its interval.

    Args:
        scores: (R, N) of R runs on the same N documents, or (N,) of one.
        labels: Likewise, true for members.
        folds: (N,) fold of each document.
        draws: How often documents are drawn.
        seed: Of the draws.

    Raises:
        ValueError: If a fold has no members, or no others.
    """
    return _area(_drawn(scores, labels, folds, draws, seed))


def difference(
    ours: FloatArray,
    theirs: FloatArray,
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Area:
    """The AUC of some scores less that of others of the same runs; arguments as `estimate`."""
    drawn = [_drawn(scores, labels, folds, draws, seed) for scores in (ours, theirs)]
    return _area(drawn[0] - drawn[1])


def _drawn(
    scores: FloatArray,
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
    draws: int,
    seed: int,
) -> FloatArray:
    """(1 + draws,) AUCs: of the documents as they are, and of each draw."""
    table, truth = np.atleast_2d(scores), np.atleast_2d(labels)
    n = table.shape[1]
    picked = np.random.default_rng(seed).integers(0, n, (draws, n))
    # Each draw's documents, moved to a range of its own, so that one count serves all draws.
    picked += n * np.arange(draws)[:, None]
    times = np.bincount(picked.ravel(), minlength=draws * n).reshape(draws, n)
    counts = np.concatenate([np.ones((1, n)), times])
    found = []
    for own, members in zip(table, truth, strict=True):
        for fold in np.unique(folds):
            there = folds == fold
            _check(members[there])
            found.append(_weighted(own[there], members[there], counts[:, there]))
    whole = np.array(found)
    # A draw may leave a small fold without members; the others tell then.
    told = ~np.isnan(whole)
    mean = np.full(draws + 1, np.nan)
    return np.divide(np.nansum(whole, axis=0), told.sum(0), out=mean, where=told.any(0))


def _weighted(scores: FloatArray, labels: NDArray[np.bool_], counts: FloatArray) -> FloatArray:
    """(B,) AUCs where each of n documents is there as often as counts (B, n) say."""
    order = np.argsort(scores, kind="stable")
    sorted_scores, members = scores[order], labels[order]
    there = counts[:, order]
    starts = np.flatnonzero(np.r_[True, sorted_scores[1:] != sorted_scores[:-1]])
    inside = np.add.reduceat(there * members, starts, axis=1)
    others = np.add.reduceat(there * ~members, starts, axis=1)
    below = np.cumsum(others, axis=1) - others
    won = (inside * (below + others / 2)).sum(1)
    pairs = inside.sum(1) * others.sum(1)
    return np.asarray(np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0))


def _area(drawn: FloatArray) -> Area:
    low, high = np.nanquantile(drawn[1:], (0.025, 0.975))
    return Area(value=float(drawn[0]), low=float(low), high=float(high))


def _check(labels: NDArray[np.bool_]) -> None:
    n = int(labels.sum())
    if not 0 < n < len(labels):
        raise ValueError(f"{n} of {len(labels)} documents are members; allowed: some, not all")


def _round(value: float) -> float:
    return round(value, 4)

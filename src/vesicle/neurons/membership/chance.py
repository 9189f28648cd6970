"""What chance alone makes of an attack: the same attack on splits that mean nothing.

Members are dealt out anew, as many in every fold as there are, and the attack is trained and judged
on that split, of which the model knows nothing. Where members had been drawn at random, this is the
very distribution of the AUC under no memory at all, however classifiers were trained (a
randomisation test, Fisher 1935). The bootstrap's interval is narrower than that: classifiers of
different folds are trained on the same documents, and what is luck in one is luck in the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.neurons.membership.auc import auc
from vesicle.plan import FloatArray

SPLITS = 20


def other_splits(
    labels: NDArray[np.bool_], folds: NDArray[np.int64], n_splits: int = SPLITS, seed: int = 0
) -> NDArray[np.bool_]:
    """(S, N) labels dealt out anew within folds.

    Args:
        labels: (N,), true for members.
        folds: (N,) fold of each document.
        n_splits: S.
        seed: Of the dealing.
    """
    generator = np.random.default_rng((2, seed))
    dealt = np.tile(labels, (n_splits, 1))
    for own in dealt:
        for fold in np.unique(folds):
            own[folds == fold] = generator.permutation(own[folds == fold])
    return dealt


def fold_aucs(
    scores: FloatArray, labels: NDArray[np.bool_], folds: NDArray[np.int64]
) -> list[float]:
    """The mean AUC within folds of each of S splits, of scores and labels (S, N)."""
    return [
        float(np.mean([auc(own[folds == f], truth[folds == f]) for f in np.unique(folds)]))
        for own, truth in zip(scores, labels, strict=True)
    ]


def chance(aucs: FloatArray) -> dict[str, float]:
    """Between what the mean AUC of R runs lies by chance, in 95 of 100 cases.

    Args:
        aucs: (R, S) of S splits that mean nothing, of every run.
    """
    spread = 1.96 * float(aucs.std(ddof=1)) / len(aucs) ** 0.5
    return {
        "mean": round(float(aucs.mean()), 4),
        "low": round(0.5 - spread, 4),
        "high": round(0.5 + spread, 4),
    }

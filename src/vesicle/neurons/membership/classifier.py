"""The meta-classifier: logistic regression on document features, judged on folds it has not seen.

Features are standardised by the training documents and

    sum_i log(1 + exp(- y_i (w x_i + b))) + P |w|^2 / 2,   y_i = 1 for members, -1 for others

is minimised by Newton's method, P being the number of features that differ at all: with it the
log-odds of the prior have unit variance, however many features there are, and nothing is tuned.

Meeus et al. 2024 use random forests of 500 trees; a logistic regression is their code's other
choice, and the one here. It finds no interactions of features. Their folds are 5 chunks of 400
documents, and they report the mean over chunks, as `vesicle.neurons.membership.auc` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FloatArray

_STEPS = 100
_CONVERGED = 1e-8


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """A fitted classifier of P features.

    Attributes:
        mean: (P,) of the training documents.
        scale: (P,) their standard deviation; features that do not differ have infinity.
        weights: (P,) of standardised features.
        bias: Log-odds of a mean document.
    """

    mean: FloatArray
    scale: FloatArray
    weights: FloatArray
    bias: float

    def decide(self, features: FloatArray) -> FloatArray:
        """(N,) log-odds that documents are members, from their features (N, P)."""
        return np.asarray((features - self.mean) / self.scale @ self.weights + self.bias)


class Training:
    """Training documents, standardised once for any labels."""

    def __init__(self, features: FloatArray) -> None:
        """Take the features (N, P) of the documents."""
        self.mean, deviation = features.mean(0), features.std(0)
        differs = deviation > 1e-12 * np.maximum(1, np.abs(self.mean))
        self.scale = np.where(differs, deviation, np.inf)
        table = (features - self.mean) / self.scale
        # Directions that no training document has stay 0, so it is solved among the others.
        left, stretch, right = np.linalg.svd(table, full_matrices=False)
        kept = stretch > 1e-10 * max(1.0, stretch.max(initial=0.0))
        self._back = right[kept].T
        self._inputs = np.c_[left[:, kept] * stretch[kept], np.ones(len(table))]
        self._penalty = np.full(self._inputs.shape[1], float(max(1, differs.sum())))
        self._penalty[-1] = 0.0

    def fit(self, labels: NDArray[np.bool_]) -> Logistic:
        """The classifier for labels (N,), true for members.

        Raises:
            ValueError: If all labels are the same.
        """
        if labels.all() or not labels.any():
            raise ValueError("all documents have the same label; allowed: members and others")
        solved = _newton(self._inputs, np.where(labels, 1.0, -1.0), self._penalty)
        return Logistic(
            mean=self.mean,
            scale=self.scale,
            weights=self._back @ solved[:-1],
            bias=float(solved[-1]),
        )


def new_folds(labels: NDArray[np.bool_], n_folds: int, seed: int) -> NDArray[np.int64]:
    """(N,) a fold for each document, drawn at random, each with its share of members and others.

    Raises:
        ValueError: If there are fewer than 2 folds, or more than members or others.
    """
    least = int(min(labels.sum(), (~labels).sum()))
    if not 2 <= n_folds <= least:
        raise ValueError(f"folds is {n_folds}; allowed: 2 to {least}, the fewest of one label")
    generator = np.random.default_rng(seed)
    folds = np.zeros(len(labels), np.int64)
    for label in (False, True):
        places = generator.permutation(np.flatnonzero(labels == label))
        folds[places] = np.arange(len(places)) % n_folds
    return folds


def out_of_fold(
    make: Callable[[NDArray[np.bool_]], FloatArray],
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> FloatArray:
    """Log-odds of each document, by the classifier that was trained on the other folds.

    Args:
        make: Features (N, P) of all documents, from which of them (N,) are trained on; it may fit
            to those.
        labels: (..., N), true for members; every set of labels has classifiers of its own.
        folds: (N,) fold of each document.

    Returns:
        (..., N).
    """
    truths = labels.reshape(-1, len(folds))
    scores = np.zeros(truths.shape)
    for fold in np.unique(folds):
        training = folds != fold
        table = make(training)
        ready = Training(table[training])
        for own, truth in zip(scores, truths, strict=True):
            own[~training] = ready.fit(truth[training]).decide(table[~training])
    return scores.reshape(labels.shape)


def _newton(inputs: FloatArray, signs: FloatArray, penalty: FloatArray) -> FloatArray:
    """Weights (R,) of inputs (N, R) that minimise the regularised loss for signs (N,)."""

    def loss(weights: FloatArray) -> float:
        margins = signs * (inputs @ weights)
        return float(np.logaddexp(0, -margins).sum() + (penalty * weights**2).sum() / 2)

    weights = np.zeros(inputs.shape[1])
    value = loss(weights)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(signs * (inputs @ weights)))  # of the wrong label
        gradient = penalty * weights - inputs.T @ (signs * chance)
        if np.abs(gradient).max() < _CONVERGED * len(inputs):
            break
        spread = np.maximum(chance * (1 - chance), 1e-12)
        curvature = inputs.T @ (inputs * spread[:, None]) + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        # Halved until it is no worse: a whole step may go too far where margins are large.
        while (found := loss(weights - length * step)) > value and length > 1e-6:
            length /= 2
        weights, value = weights - length * step, min(found, value)
    return weights

"""All attacks on documents of known membership: each document is judged by others' classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vesicle.neurons.membership.classifier import Training, out_of_fold
from vesicle.neurons.membership.features import AGGREGATIONS, NORMALISATIONS, features
from vesicle.neurons.membership.probabilities import TokenProbabilities, together
from vesicle.neurons.membership.thresholds import THRESHOLDS, threshold_scores
from vesicle.plan import FloatArray

PUBLISHED = "max-tf/histogram"
"""The variant that does best in the paper: named beforehand, and not chosen by what is found."""
PLAINEST = "loss"
"""The threshold that needs nothing but the model; judged beside it."""
LEARNT = tuple(f"{n}/{a}" for a in AGGREGATIONS for n in NORMALISATIONS)
ATTACKS = (*LEARNT, *THRESHOLDS)
"""The paper's ten variants, and the thresholds before it."""


def attack_scores(
    found: TokenProbabilities,
    texts: Sequence[str],
    labels: NDArray[np.bool_],
    bins: int,
) -> dict[str, FloatArray]:
    """Scores (N,) of every one of `ATTACKS`; the groups of `found` are the folds.

    Args:
        found: Predictions of N documents.
        texts: The documents, as far as they were asked about.
        labels: (N,), true for members.
        bins: Of a histogram.
    """
    learnt = {name: learnt_scores(found, labels, name, bins) for name in LEARNT}
    return {**learnt, **threshold_scores(found, texts)}


def learnt_scores(
    found: TokenProbabilities, labels: NDArray[np.bool_], name: str, bins: int
) -> FloatArray:
    """Scores (..., N) of one of `LEARNT`, for labels (..., N)."""
    normalisation, _, aggregation = name.partition("/")

    def make(training: NDArray[np.bool_]) -> FloatArray:
        return features(found, training, normalisation, aggregation, bins)

    return out_of_fold(make, labels, found.groups)


def infer_unknown(
    known: TokenProbabilities,
    labels: NDArray[np.bool_],
    unknown: TokenProbabilities,
    bins: int,
    name: str = PUBLISHED,
) -> FloatArray:
    """Chances, from 0 to 1, that documents of unknown membership are members.

    Args:
        known: Predictions of N documents, on all of which a classifier is trained.
        labels: (N,), true for members.
        unknown: Predictions of n other documents, by the same model.
        bins: Of a histogram.
        name: One of `LEARNT`.

    Returns:
        (n,). A chance is told as if documents were members as often as those that are known; it is
        no better calibrated than the classifier.
    """
    normalisation, _, aggregation = name.partition("/")
    training = np.arange(len(known.lengths) + len(unknown.lengths)) < len(labels)
    table = features(together(known, unknown), training, normalisation, aggregation, bins)
    odds = Training(table[training]).fit(labels).decide(table[~training])
    return np.asarray(1 / (1 + np.exp(-odds)))

"""Document features of membership inference: normalised token probabilities, aggregated.

Of a token v that was predicted with probability p, where the likeliest one had p_max,

    F = - log N,     N = p            none
                         p / R(v)     ratio-tf, ratio-gp
                         (1 - (p_max - p)) / R(v)     max-tf, max-gp

with R(v) how common the token is: its share of the tokens of the training documents (tf), or its
mean predicted probability over them (gp); where either is 0, half of the least that is not. Of the
F of a document are made *aggregate* features (minimum, maximum, mean, standard deviation, the
percentiles 1, 5, 10, 25, 50, 75, 90, 95 and 99) or a *histogram* (the share of its tokens in each
of B bins of equal width between the least and the greatest F of the training documents).

Meeus et al. 2024 ("Did the Neurons Read your Book?", sections 4.2 and 4.3). What differs here: F
beyond the outer bins are counted in those, and the first token of a document, which is never
predicted, is not counted in R either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.neurons.membership.probabilities import TokenProbabilities
from vesicle.plan import FloatArray

NORMALISATIONS = ("none", "ratio-tf", "ratio-gp", "max-tf", "max-gp")
AGGREGATIONS = ("aggregate", "histogram")
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def features(
    found: TokenProbabilities,
    training: NDArray[np.bool_],
    normalisation: str,
    aggregation: str,
    bins: int = 100,
) -> FloatArray:
    """Features of all documents; whatever is fitted is fitted to the training documents alone.

    Args:
        found: Predictions of N documents.
        training: (N,) which of them a classifier will be trained on: whole groups of `found`.
        normalisation: One of `NORMALISATIONS`.
        aggregation: One of `AGGREGATIONS`.
        bins: B, of a histogram.

    Returns:
        (N, 13) or (N, B).

    Raises:
        ValueError: If a name is unknown, there are no bins, or a group is divided.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
    values = token_values(found, normalisation, rarity(found, training, normalisation))
    if aggregation == "aggregate":
        return aggregates(values, found.lengths)
    edges = bin_edges(values[training[found.owners]], bins)
    return histograms(values, found.owners, len(found.lengths), edges)


def rarity(
    found: TokenProbabilities, training: NDArray[np.bool_], normalisation: str
) -> FloatArray:
    """R, (V,): how common every token is in the training documents; ones for `none`.

    Args:
        found: Predictions of N documents.
        training: (N,) the training documents.
        normalisation: One of `NORMALISATIONS`.

    Raises:
        ValueError: If the name is unknown, or a group is divided by `training`.
    """
    vocabulary = found.general.shape[1]
    if normalisation == "none":
        return np.ones(vocabulary)
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation is {normalisation!r}; allowed: {', '.join(NORMALISATIONS)}"
        )
    if normalisation.endswith("tf"):
        counts = np.bincount(found.tokens[training[found.owners]], minlength=vocabulary)
        return _filled(counts / counts.sum())
    groups = np.unique(found.groups[training])
    if (np.isin(found.groups, groups) != training).any():
        raise ValueError("training documents are not whole groups of what was asked together")
    summed = found.general[groups].sum(0)
    return _filled(summed / summed.sum())  # the probabilities of a prediction sum to 1


def token_values(found: TokenProbabilities, normalisation: str, common: FloatArray) -> FloatArray:
    """F, (M,), under R (V,)."""
    top = found.log_p
    if normalisation.startswith("max"):
        # 1 - p_max + p, exact also where p_max is nearly 1.
        numerator = -np.expm1(np.minimum(found.log_top, 0)) + np.exp(found.log_p)
        top = np.log(numerator)
    return np.asarray(np.log(common)[found.tokens] - top)


def aggregates(values: FloatArray, lengths: NDArray[np.int64]) -> FloatArray:
    """(N, 13) of values (M,), one document behind the other."""
    rows = []
    for own in np.split(values, np.cumsum(lengths)[:-1]):
        quantiles = np.percentile(own, PERCENTILES)
        rows.append([own.min(), own.max(), own.mean(), own.std(), *quantiles])
    return np.array(rows)


def bin_edges(values: FloatArray, bins: int) -> FloatArray:
    """(B + 1,) edges of bins of equal width between the least and the greatest value.

    Raises:
        ValueError: If there are no bins.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; allowed: 1 and above")
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def histograms(
    values: FloatArray, owners: NDArray[np.int64], n_documents: int, edges: FloatArray
) -> FloatArray:
    """(N, B) share of each document's values (M,) in each bin; the outer bins have no end."""
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    counts = np.bincount(owners * bins + place, minlength=n_documents * bins)
    table = counts.reshape(n_documents, bins).astype(np.float64)
    return np.asarray(table / table.sum(1, keepdims=True))


def _filled(shares: FloatArray) -> FloatArray:
    """Shares without zeros."""
    return np.where(shares > 0, shares, shares[shares > 0].min() / 2)

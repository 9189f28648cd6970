"""The four parts of multilingual inference, by layer (Zhang et al. 2025).

Published, by how many language neurons (specific and related) and general neurons layers have:

    1 understanding        many language neurons, few general ones
    2 shared space         hardly any language neurons, many general ones
    3 output transformation  many language neurons again, fewest general ones
    4 vocabulary           language neurons rise, and general ones most of all

The paper draws the boundaries by eye. Here they are those four runs of consecutive layers whose
means leave the least squared error, over both curves, each scaled to unit deviation; how many runs
the curves call for is told by the Bayesian information criterion. What was published is then a set
of differences between the means of neighbouring parts. A pattern by layer is no proof of what the
parts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vesicle.neurons.languages.entropy import GENERAL, RELATED, SPECIFIC, Classes
from vesicle.shapes import ModelShape

NAMES = ("understanding", "shared space", "output transformation", "vocabulary")
LANGUAGE_CURVE, GENERAL_CURVE = 0, 1
MOST_PARTS = 6
Array = NDArray[np.float64]
PUBLISHED: tuple[tuple[str, int, int, int], ...] = (
    ("language neurons fall into the shared space", LANGUAGE_CURVE, 0, 1),
    ("general neurons rise into the shared space", GENERAL_CURVE, 1, 0),
    ("language neurons rise out of the shared space", LANGUAGE_CURVE, 2, 1),
    ("general neurons fall out of the shared space", GENERAL_CURVE, 1, 2),
    ("language neurons rise in the last part", LANGUAGE_CURVE, 3, 2),
    ("general neurons rise in the last part", GENERAL_CURVE, 3, 2),
)
"""Each in words, its curve, and the part that is higher and the one that is lower."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Layers in runs.

    Attributes:
        starts: The first layer of each part.
        explained: Share of the curves' variance that the parts' means explain.
        criterion: Bayesian information criterion of 1, 2, ... parts; the lowest is called for.
    """

    starts: tuple[int, ...]
    explained: float
    criterion: tuple[float, ...]


def by_layer(classes: Classes, shape: ModelShape) -> dict[str, list[int]]:
    """How many neurons of each class layers have: `specific`, `related`, `general`."""
    kinds = classes.kind.reshape(shape.n_layers, shape.ffn_width)
    return {
        name: (kinds == kind).sum(-1).tolist()
        for name, kind in (("specific", SPECIFIC), ("related", RELATED), ("general", GENERAL))
    }


def curves(classes: Classes, shape: ModelShape) -> Array:
    """(2, L) shares of a layer's neurons that are of languages, and general."""
    found = {name: np.array(row) for name, row in by_layer(classes, shape).items()}
    language = found["specific"] + found["related"]
    return np.stack([language, found["general"]]) / shape.ffn_width


def divide(rows: Array, n_parts: int = len(NAMES)) -> Parts:
    """Divide layers into runs.

    Args:
        rows: (C, L) curves.
        n_parts: How many; at most L.
    """
    scale = rows.std(-1, keepdims=True)
    scaled = (rows - rows.mean(-1, keepdims=True)) / np.where(scale > 0, scale, 1)
    n_layers = rows.shape[1]
    most = min(max(MOST_PARTS, n_parts), n_layers)
    error = np.array(
        [
            [_error(scaled[:, i : j + 1]) if i <= j else 0.0 for j in range(n_layers)]
            for i in range(n_layers)
        ]
    )
    # best[n][j]: the least error of layers up to j in n + 1 runs, and where the last one begins.
    best = [[(float(error[0, j]), 0) for j in range(n_layers)]]
    for n in range(1, most):
        best.append(
            [
                min(
                    ((best[n - 1][i - 1][0] + float(error[i, j]), i) for i in range(n, j + 1)),
                    default=(np.inf, 0),
                )
                for j in range(n_layers)
            ]
        )
    starts, end = list[int](), n_layers - 1
    for n in reversed(range(min(n_parts, n_layers))):
        starts.append(best[n][end][1])
        end = starts[-1] - 1
    total = max(float(error[0, -1]), 1e-12)
    left = best[min(n_parts, n_layers) - 1][-1][0]
    size = scaled.size
    return Parts(
        starts=tuple(reversed(starts)),
        explained=1 - left / total,
        criterion=tuple(
            # A floor, so that a perfect fit is not worth everything.
            size * float(np.log(max(best[n][-1][0], 1e-3 * total) / size))
            + ((n + 1) * len(rows) + n) * float(np.log(size))
            for n in range(most)
        ),
    )


def means(rows: Array, starts: Sequence[int]) -> Array:
    """(C, P) means of curves (C, L) over parts."""
    return np.stack([part.mean(-1) for part in np.split(rows, list(starts)[1:], axis=1)], axis=1)


def differences(rows: Array, starts: Sequence[int]) -> Array:
    """(6,) of each of `PUBLISHED`, the higher part less the lower, of curves (2, L)."""
    found = means(rows, starts)
    return np.array([found[curve, high] - found[curve, low] for _, curve, high, low in PUBLISHED])


def shuffled(counts: Tensor, tokens: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mix languages: each chunk of sentences gets the languages' labels in another order.

    Args:
        counts: (C, K, M) of chunks.
        tokens: (C, K).
        rng: Draws the orders.

    Returns:
        Both, summed over chunks: (K, M) and (K,) of K mixtures.
    """
    n_chunks, n_languages = tokens.shape
    mixed, length = counts[0] * 0, tokens[0] * 0
    for chunk in range(n_chunks):
        order = rng.permutation(n_languages)
        mixed, length = mixed + counts[chunk, order], length + tokens[chunk, order]
    return mixed, length


def _error(rows: Array) -> float:
    return float(((rows - rows.mean(-1, keepdims=True)) ** 2).sum())

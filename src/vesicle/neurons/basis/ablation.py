"""How few features, or edges, a network can do with.

What is dropped is set to its mean: a feature everywhere, an edge in what one feature of the next
layer is computed from. The most important stay. The authors' code asks, by bisection, for the
smallest number that keeps the accuracy within 0.001 of the whole network's; so does `fewest`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vesicle.neurons.basis.coordinates import Basis
from vesicle.neurons.basis.local_interaction import Section

_NUMBERS_AT_ONCE = 1 << 23


def keep_features(x: Tensor, basis: Basis, count: int, skipped: int = 0) -> Tensor:
    """Activations (..., D) of which only the first features are left, none for a count of 0.

    Args:
        x: (..., D), or (..., T, D) where positions are skipped.
        basis: Of them.
        count: Features that stay.
        skipped: First positions that stay as they are.
    """
    left = basis.mean.expand_as(x)
    if count:
        kept = basis.first(count)
        left = kept.restored(kept.features(x))
    return torch.cat([x[..., :skipped, :], left[..., skipped:, :]], -2) if skipped else left


@torch.no_grad()
def keep_edges(section: Section, x: Tensor, source: Basis, target: Basis, mask: Tensor) -> Tensor:
    """(N, D') activations of the next layer, each feature computed from the edges it has left.

    Args:
        section: From activations of the source to those of the target; each point is by itself.
        x: (N, D).
        source: Basis of these activations.
        target: Basis of the next layer.
        mask: (k_target, k_source) True for edges that stay.
    """
    features = source.features(x)
    most = max(1, _NUMBERS_AT_ONCE // x.numel())
    found = []
    for rows, encode in zip(mask.split(most), target.encode.split(most), strict=True):
        given = source.restored(features * rows[:, None].to(features.dtype))  # (rows, N, D)
        found.append(((section(given) - target.mean) * encode[:, None]).sum(-1))
    return target.restored(torch.cat(found).mT)


def largest(edges: Tensor, count: int) -> Tensor:
    """A mask of edges that is True for the largest, so many of them."""
    mask = torch.zeros(edges.numel(), dtype=torch.bool)
    mask[edges.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(edges.shape)


def fewest(score: Callable[[int], float], most: int, least: float) -> int:
    """The smallest number from 0 to `most` with a score of at least `least`, by bisection.

    Scores are taken to rise with the number, as there; where they do not, it is one such
    number. With `most` it need not be reached: that is then the answer.
    """
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        if score(middle) >= least:
            high = middle
        else:
            low = middle
    return high

"""Principal components: the control of the Local Interaction Basis, and what it begins with.

With C = U diag(d) Uᵀ the covariance of a layer's activations, the features are Uᵀ (x - mean), by
falling variance. Directions with hardly any variance are dropped. What later layers make of a
direction plays no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.neurons.basis.coordinates import Basis, Moments

TOLERANCE = 1e-8
"""Directions with less than this share of the largest variance, or importance, are dropped."""


def principal_components(known: Moments, tolerance: float = TOLERANCE) -> Basis:
    """The principal components of a layer, in float64.

    Args:
        known: Mean and covariance of its activations.
        tolerance: See `TOLERANCE`.

    Raises:
        ValueError: The activations do not vary.
    """
    variance, directions = descending(known.covariance)
    if variance[0] <= 0:
        raise ValueError("the activations are all the same; allowed: activations that vary")
    kept = variance > tolerance * variance[0]
    directions = directions[:, kept]
    return Basis(
        mean=known.mean, encode=directions.mT, decode=directions, importance=variance[kept]
    )


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n) of a symmetric matrix, the largest value first."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(0), vectors.flip(1)

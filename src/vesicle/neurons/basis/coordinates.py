"""A basis of a layer's activations: features from activations, and activations from features.

    features = encode (x - mean)          restored = mean + decode features

The importance of a feature is the mean of its square. A basis may have fewer features than the
layer has dimensions: what lies in the directions that it drops is taken to be at its mean.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Basis:
    """k features of activations with D dimensions, the most important first.

    Attributes:
        mean: (D,) of the activations.
        encode: (k, D).
        decode: (D, k), with `encode @ decode` the identity.
        importance: (k,) variance of each feature, falling.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    importance: Tensor

    @property
    def n_features(self) -> int:
        """How many there are, k."""
        return len(self.encode)

    def features(self, x: Tensor) -> Tensor:
        """(..., k) features of activations (..., D)."""
        return (x - self.mean) @ self.encode.mT

    def restored(self, features: Tensor) -> Tensor:
        """(..., D) activations from features (..., k)."""
        return self.mean + features @ self.decode.mT

    def first(self, count: int) -> Basis:
        """The most important features alone.

        Raises:
            ValueError: There are fewer, or none is asked for.
        """
        if not 1 <= count <= self.n_features:
            raise ValueError(f"count is {count}; allowed: 1 to {self.n_features}")
        return Basis(
            mean=self.mean,
            encode=self.encode[:count],
            decode=self.decode[:, :count],
            importance=self.importance[:count],
        )

    def to(self, dtype: torch.dtype) -> Basis:
        """The same in another dtype."""
        return Basis(**{name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the attributes, as they are saved."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Moments:
    """Mean and covariance of activations that come in parts, summed in float64."""

    def __init__(self, width: int) -> None:
        """Of no activations yet.

        Args:
            width: D.
        """
        self._count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take activations (..., D)."""
        flat = x.detach().reshape(-1, len(self._sum)).double()
        self._count += len(flat)
        self._sum += flat.sum(0)
        self._products += flat.mT @ flat

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        """(D, D)."""
        return self._products / self._count - torch.outer(self.mean, self.mean)


def moments(x: Tensor) -> Moments:
    """Of activations (..., D) that are all there."""
    found = Moments(x.shape[-1])
    found.add(x)
    return found

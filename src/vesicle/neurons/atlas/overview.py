"""What the cards of a layer come to: scores beside their control, rare neurons, drive.

Scores are those of the stronger way. Their control are random mixtures of the same layer's neurons
(`decoding.mixtures`): a neuron that is no better than those decodes to nothing of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.intervals import interval
from vesicle.neurons.cards import Cards

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOP = 0.95
"""Above this quantile a score is called high."""
RARE = 1e-3
"""A neuron is rare where a smaller share of tokens is above half of its maximum."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one projection.

    Attributes:
        quantiles: (L, 5) of neurons' scores, as `QUANTILES`.
        mean: (L,).
        mixed_mean: (L,) of random mixtures of the same layer.
        high: The 95th percentile of all neurons' scores.
        share_high: (L,) of neurons above it.
        mixed_high: The 95th percentile of all mixtures' scores.
        share_above_mixed: (L,) of neurons above it; 5 % if they were mixtures.
        above_mixed: That share of all neurons, and its 95 % interval over layers.
    """

    quantiles: Tensor
    mean: Tensor
    mixed_mean: Tensor
    high: float
    share_high: Tensor
    mixed_high: float
    share_above_mixed: Tensor
    above_mixed: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """By layer.

    Attributes:
        scores: By projection.
        rare: (L,) share of rare neurons, as `RARE` has it.
        drive: By transmitter (L,), the layer's share of the size of all neurons' contributions.
    """

    scores: dict[str, Scores]
    rare: Tensor
    drive: dict[str, Tensor]


def overview(cards: Cards) -> Overview:
    """Count.

    Args:
        cards: A model's.
    """
    return Overview(
        scores={kind: _scores(cards, place) for place, kind in enumerate(cards.decoded.kinds)},
        rare=(cards.share_above_half < RARE).double().mean(1),
        drive={name: _shares(size) for name, size in cards.drives.size.items()},
    )


def _scores(cards: Cards, place: int) -> Scores:
    own = cards.decoded.scores[:, place].amax(-1).double()  # (L, F)
    mixed = cards.mixtures[:, place].double()
    high, mixed_high = float(own.quantile(TOP)), float(mixed.quantile(TOP))
    above = (own > mixed_high).double().mean(1)
    return Scores(
        quantiles=own.quantile(own.new_tensor(QUANTILES), dim=1).T,
        mean=own.mean(1),
        mixed_mean=mixed.mean(1),
        high=high,
        share_high=(own > high).double().mean(1),
        mixed_high=mixed_high,
        share_above_mixed=above,
        above_mixed=(float(above.mean()), *interval(above.numpy())),
    )


def _shares(size: Tensor) -> Tensor:
    by_layer = size.double().sum(1)
    return by_layer / by_layer.sum().clamp_min(torch.finfo(torch.float64).tiny)

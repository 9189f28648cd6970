"""Linear predictor: one read-out vector per layer and transmitter."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.plan import FloatArray
from vesicle.predictors.base import Predictor, PredictorConfig, State


class LinearPredictor(Predictor):
    """drive = W_l h, with W_l (A, D) starting at zero."""

    kind = "linear"

    def __init__(self, config: PredictorConfig) -> None:
        """Start with read-outs (L, A, D) of zero: every level then equals the dial."""
        super().__init__(config)
        self.weight = nn.Parameter(
            torch.zeros(config.n_layers, len(config.transmitters), config.width)
        )

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A): the layer's read-outs times the normalised hidden state (B, T, D)."""
        return nn.functional.linear(feature, self.weight[layer])

    def release_row(
        self, layer: int, hidden: Tensor, position: int, dial: float, state: State
    ) -> FloatArray:
        """As the base class, in NumPy.

        A dozen tiny tensor operations would cost more than the product.
        """
        if dial >= 1:
            return np.ones(len(self.config.transmitters))
        h = hidden.detach().float().numpy()
        # Views of the parameters, not copies.
        weight = self.weight.detach()[layer].numpy()
        offset, log_slope, place = (
            p.detach()[layer].numpy() for p in (self.offset, self.log_slope, self.position_weight)
        )
        scale = 1 / math.sqrt(float(h @ h) / len(h) + 1e-6)
        z = (
            (weight @ h).astype(np.float64) * scale
            + offset
            + np.exp(log_slope) * math.log((1 - dial) / dial)
            + place * (math.log2((position + 1) / 16) / 8)
        )
        return 1 / (1 + np.exp(z))

    @property
    def flops(self) -> int:
        """2 D A FLOPs per token and layer, for the read-outs."""
        return 2 * self.config.width * len(self.config.transmitters)

"""MLP predictor: one hidden layer of `hidden` units, for levels that need conjunctions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_


class MlpPredictor(Predictor):
    """drive = V_l gelu(U_l h), with U_l (M, D) random and V_l (A, M) starting at zero."""

    kind = "mlp"

    def __init__(self, config: PredictorConfig) -> None:
        """Random features, zero read-outs."""
        super().__init__(config)
        n, m, a = config.n_layers, config.hidden, len(config.transmitters)
        self.inner = uniform_(torch.empty(n, m, config.width), config.width)
        self.outer = nn.Parameter(torch.zeros(n, a, m))

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), read out of M units on the normalised hidden state (B, T, D)."""
        inner = nn.functional.gelu(nn.functional.linear(feature, self.inner[layer]))
        return nn.functional.linear(inner, self.outer[layer])

    @property
    def flops(self) -> int:
        """2 M (D + A) FLOPs per token and layer, for the two products."""
        return 2 * self.config.hidden * (self.config.width + len(self.config.transmitters))

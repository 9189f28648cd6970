"""Linear predictor: one read-out vector per layer and transmitter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State


class LinearPredictor(Predictor):
    """drive = W_l h, with W_l (A, D) starting at zero."""

    kind = "linear"

    def __init__(self, config: PredictorConfig) -> None:
        """Zero read-outs."""
        super().__init__(config)
        self.weight = nn.Parameter(
            torch.zeros(config.n_layers, len(config.transmitters), config.width)
        )

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A)."""
        return nn.functional.linear(feature, self.weight[layer])

    @property
    def flops(self) -> int:
        """2 D A."""
        return 2 * self.config.width * len(self.config.transmitters)

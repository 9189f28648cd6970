"""Pooled predictor: what a text is like on the whole, rather than each of its tokens.

    drive_t = W_l mean(h_1, ..., h_t)

over the normalised hidden states of the text so far, so that levels settle as it goes on: release
per sequence, as far as a causal one may.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State


class PooledPredictor(Predictor):
    """A linear read-out W_l (A, D), starting at zero, of the mean feature so far."""

    kind = "pooled"
    remembers = True

    def __init__(self, config: PredictorConfig) -> None:
        """Start with read-outs (L, A, D) of zero."""
        super().__init__(config)
        self.weight = nn.Parameter(
            torch.zeros(config.n_layers, len(config.transmitters), config.width)
        )

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A) from the normalised hidden state (B, T, D).

        `state[layer]` keeps the sum of all features so far and their number, (B, D + 1).
        """
        counted = torch.cat([feature, torch.ones_like(feature[..., :1])], dim=-1)
        sums = counted.cumsum(1)
        if layer in state:
            sums = sums + state[layer][:, None]
        state[layer] = sums[:, -1].clone()  # a view would keep the whole chunk
        return nn.functional.linear(sums[..., :-1] / sums[..., -1:], self.weight[layer])

    @property
    def flops(self) -> int:
        """2 D A for the read-outs, 2 D for the running mean."""
        return 2 * self.config.width * (len(self.config.transmitters) + 1)

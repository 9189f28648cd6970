"""Quadratic predictor: one hidden layer of quadratic neurons, each with a product of its own.

After Fan et al. 2021, "On Expressivity and Trainability of Quadratic Networks" (arXiv 2110.06081).
A neuron computes, in place of an inner product,

    q(x) = (w_r x + b_r) (w_g x + b_g) + w_b (x * x) + c
    drive = V_l relu(q(h))

so that one neuron can tell both tails of a feature from its middle, or require two at once.
Training starts as the paper's ReLinear does: w_g = 0, b_g = 1, w_b = 0, c = 0. Each neuron is then
a conventional one, w_r x + b_r, and grows quadratic as far as that pays.

ReLinear also holds the quadratic terms back, by a smaller learning rate or by shrinking them. The
trainer here does neither: `QuadraticPredictor.slow` names the parameters for one that does.

Names: w_r is `left`, w_g `right`, w_b `square`; b_r, b_g and c are their biases.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_


class QuadraticPredictor(Predictor):
    """drive = V_l relu(q(h)), with M quadratic neurons q and V_l (A, M) starting at zero.

    Attributes:
        slow: Names of the quadratic terms, which ReLinear trains more slowly than the rest.
    """

    kind = "quadratic"
    slow: ClassVar[tuple[str, ...]] = ("right", "right_bias", "square", "square_bias")

    def __init__(self, config: PredictorConfig) -> None:
        """Random linear neurons, quadratic terms without effect, zero read-outs."""
        super().__init__(config)
        n, m, a = config.n_layers, config.hidden, len(config.transmitters)
        self.left = uniform_(torch.empty(n, m, config.width), config.width)
        self.left_bias = nn.Parameter(torch.zeros(n, m))
        self.right = nn.Parameter(torch.zeros(n, m, config.width))
        self.right_bias = nn.Parameter(torch.ones(n, m))
        self.square = nn.Parameter(torch.zeros(n, m, config.width))
        self.square_bias = nn.Parameter(torch.zeros(n, m))
        self.outer = nn.Parameter(torch.zeros(n, a, m))

    def neurons(self, layer: int, feature: Tensor) -> Tensor:
        """(B, T, M): q, before rectification, of the normalised hidden state (B, T, D)."""
        linear = nn.functional.linear
        left = linear(feature, self.left[layer], self.left_bias[layer])
        right = linear(feature, self.right[layer], self.right_bias[layer])
        return left * right + linear(feature.square(), self.square[layer], self.square_bias[layer])

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), read out of the rectified neurons."""
        return nn.functional.linear(self.neurons(layer, feature).relu(), self.outer[layer])

    @property
    def flops(self) -> int:
        """2 M (3 D + A + 1) + D FLOPs per token and layer: four products, q's terms, squares."""
        width, a = self.config.width, len(self.config.transmitters)
        return 2 * self.config.hidden * (3 * width + a + 1) + width

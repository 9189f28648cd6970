"""Stand-ins: small maps that a token takes instead of a whole FFN or attention layer.

Fitted to the modules that they replace by `calibration.standins`; the base model is never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StandIns(nn.Module):
    """Low-rank maps in place of skipped modules: y = up (down x) + bias, x the module's own input.

    Attributes:
        down: (L, r, D).
        up: (L, D, r).
        bias: (L, D).
    """

    def __init__(self, n_layers: int, width: int, rank: int) -> None:
        """All zero: a stand-in that has not been fitted contributes nothing."""
        super().__init__()
        self.down = nn.Parameter(torch.zeros(n_layers, rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(n_layers, width, rank), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(n_layers, width), requires_grad=False)

    @property
    def rank(self) -> int:
        """R, the inner width of the maps, the same in every layer."""
        return int(self.down.shape[1])

    def apply_layer(self, layer: int, x: Tensor) -> Tensor:
        """The stand-in of `layer` on x (..., D)."""
        inner = nn.functional.linear(x, self.down[layer].to(x.dtype))
        return nn.functional.linear(inner, self.up[layer].to(x.dtype), self.bias[layer].to(x.dtype))

"""Predictor: hidden state (B, T, D) to levels (B, T, A) of the A transmitters that it releases.

Every trained predictor shares one read-out. With h the residual stream after a layer's
self-attention, p the token's position and delta the dial in (0, 1],

    deficit = sigmoid(drive(h / rms(h)) + a + s log((1 - delta) / delta) + w log2((p + 1) / 16) / 8)
    level = 1 - deficit

with offsets a, slopes s > 0 and position weights w per layer and transmitter. At delta = 1 the
logarithm is minus infinity, so every level is exactly 1: rest holds by construction, whatever was
learnt. With everything at its initial value (drive 0, a = 0, s = 1) the deficit is 1 - delta for
all tokens and layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vesicle.plan import FloatArray

State = dict[int, Tensor]
"""What a predictor carries from one chunk of a sequence to the next, by layer."""


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Sizes of a predictor.

    Attributes:
        n_layers: L.
        width: D.
        transmitters: Names of the A transmitters released, in output order.
        hidden: Inner width, where the predictor has one.
    """

    n_layers: int
    width: int
    transmitters: tuple[str, ...]
    hidden: int = 16

    def __post_init__(self) -> None:
        """Check that there are transmitters, all known, and that `hidden` is from 1 up.

        Raises:
            ValueError: Naming the setting or the transmitter, and what is allowed.
        """
        from vesicle.transmitters import index

        for name in self.transmitters:
            index(name)
        if not self.transmitters:
            raise ValueError("transmitters is empty; release at least one")
        if self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; allowed: 1 and above")


class Levels(nn.Module, ABC):
    """Anything that releases levels: trained predictors and controls alike."""

    kind: ClassVar[str]
    remembers: ClassVar[bool] = False  # whether `state` goes from token to token
    config: PredictorConfig

    @abstractmethod
    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels after `layer`'s self-attention.

        A sequence may come whole, in chunks or token by token; the levels are the same.

        Args:
            layer: 0 to L - 1.
            hidden: (B, T, D) residual stream after self-attention.
            positions: (B, T).
            dial: (B,) in (0, 1]; 1 is rest.
            state: Updated in place.

        Returns:
            (B, T, A) in [0, 1].
        """

    def release_row(
        self, layer: int, hidden: Tensor, position: int, dial: float, state: State
    ) -> FloatArray:
        """`release` for one token of one sequence, hidden (D,): (A,).

        Decoding calls it once per layer.
        """
        levels = self.release(
            layer,
            hidden[None, None],
            torch.tensor([[position]]),
            torch.tensor([dial]),
            state,
        )
        return levels[0, 0].detach().double().cpu().numpy()

    @property
    @abstractmethod
    def flops(self) -> int:
        """FLOPs per token and layer."""

    @property
    @abstractmethod
    def weights_read(self) -> int:
        """Numbers read per token and layer."""


class Predictor(Levels):
    """A trained predictor: a drive from the hidden state, and the shared read-out."""

    def __init__(self, config: PredictorConfig) -> None:
        """Start at rest plus the dial: drive 0, the same deficit everywhere."""
        super().__init__()
        self.config = config
        shape = (config.n_layers, len(config.transmitters))
        self.offset = nn.Parameter(torch.zeros(shape))
        self.log_slope = nn.Parameter(torch.zeros(shape))
        self.position_weight = nn.Parameter(torch.zeros(shape))

    @abstractmethod
    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A) from the normalised hidden state (B, T, D)."""

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels (B, T, A); see the base class."""
        parameter = self.offset
        feature = nn.functional.rms_norm(hidden.to(parameter.dtype), (self.config.width,), eps=1e-6)
        rest = (dial >= 1)[:, None, None]
        # Minus infinity at rest would make the gradient of the slope undefined.
        odds = ((1 - dial) / dial)[:, None, None].to(parameter.dtype).masked_fill(rest, 1.0)
        logit = odds.log()
        place = torch.log2((positions.to(parameter.dtype) + 1) / 16)[..., None] / 8
        z = (
            self.drive(layer, feature, state)
            + (self.offset[layer] + self.log_slope[layer].exp() * logit)
            + self.position_weight[layer] * place
        )
        return torch.sigmoid(-z).masked_fill(rest, 1.0)

    @property
    def weights_read(self) -> int:
        """Parameters of one layer."""
        return sum(p.numel() for p in self.parameters()) // self.config.n_layers


def uniform_(tensor: Tensor, fan_in: int) -> nn.Parameter:
    """A parameter drawn from U(-1, 1) / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(tensor.uniform_(-bound, bound))

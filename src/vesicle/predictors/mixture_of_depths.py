"""Mixture of depths: in every second layer, the tokens that a router ranks highest run.

After Raposo et al. 2024 (arXiv 2404.02258, equation 1 and the sampling of section 3). With h the
normalised residual stream, r_t = w_l . h_t in layers 1, 3, ..., and k the capacity c times T,

    level_t = sigmoid(r_t - m),   m half-way between the k-th and the (k + 1)-th largest of r

so that k tokens of each sequence have levels from 1/2 up. m takes no gradient; w has its own from
straight-through masks. Where all tokens run, m is the smallest r. Other layers release 1.

The dial delta sets the capacity, c = 1 - 2 (1 - delta), at least 1/16: half of the layers are
routed, so each has to save twice as much for delta to come out near the executed share of FLOPs.

The k largest of a whole sequence are not known while it is being read. So a second read-out v_l
says from h, without gradient to it, whether a token is among them. It is the shared read-out of
`base.py` with c as its dial, trained by

    auxiliary = sum over routed layers of the mean binary cross-entropy of level against r_t >= m

and its levels are released in all but training: in evaluation mode, and wherever no gradients are
recorded, as by authors of Plans. Those are causal.

k alone sets the share while training. A price on the share cannot move it and pushes w about: train
without one.

Not reproduced: the block's output is not multiplied by r, which is how the paper's router has its
gradient. A routed block is the FFN of layer l with the attention of layer l + 1. Keys and values of
skipped tokens are written, and others attend to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.plan import FloatArray
from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_

_LEAST = 1 / 16
"""Capacity at the lowest dials."""


class MixtureOfDepths(Predictor):
    """Serotonin from w_l (1, D), random, while training; from v_l (1, D), zero at first, else."""

    kind = "mod"

    def __init__(self, config: PredictorConfig) -> None:
        """Random routers, zero read-outs.

        Raises:
            ValueError: If anything but serotonin is to be released.
        """
        if config.transmitters != ("serotonin",):
            raise ValueError(
                f"transmitters are {', '.join(config.transmitters)}; {self.kind!r} releases "
                "serotonin alone"
            )
        super().__init__(config)
        n, d = config.n_layers, config.width
        self.router = uniform_(torch.empty(n, 1, d), d)
        self.weight = nn.Parameter(torch.zeros(n, 1, d))
        self._auxiliary = torch.zeros(())

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, 1): v_l times the normalised hidden state (B, T, D)."""
        return nn.functional.linear(feature, self.weight[layer])

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels (B, T, 1): by rank where gradients of training are recorded, else causal."""
        ranks = self.training and torch.is_grad_enabled()
        if ranks and layer == 0:
            self._auxiliary = self.offset.new_zeros(())
        if layer % 2 == 0:
            return self.offset.new_ones(*hidden.shape[:2], 1)
        capacity = (1 - 2 * (1 - dial)).clamp(min=_LEAST)
        foreseen = super().release(layer, hidden.detach(), positions, capacity, state)
        if not ranks:
            return foreseen
        feature = nn.functional.rms_norm(
            hidden.to(self.router.dtype), (self.config.width,), eps=1e-6
        )
        r = nn.functional.linear(feature, self.router[layer])  # (B, T, 1)
        levels = torch.sigmoid(r - _middle(r.detach(), capacity))
        chosen = (levels.detach() >= 0.5).to(levels.dtype)
        self._auxiliary = self._auxiliary + nn.functional.binary_cross_entropy(foreseen, chosen)
        return levels.masked_fill((dial >= 1)[:, None, None], 1.0)

    @torch.no_grad()
    def release_row(
        self, layer: int, hidden: Tensor, position: int, dial: float, state: State
    ) -> FloatArray:
        """As the base class, and causal while training too: one token has no rank."""
        return super().release_row(layer, hidden, position, dial, state)

    def auxiliary(self) -> Tensor:
        """What the causal read-out's mistakes cost in the latest training pass, in nats; a scalar.

        0 before there was one.
        """
        return self._auxiliary

    @property
    def _routed(self) -> int:
        """Layers with a router."""
        return self.config.n_layers // 2

    @property
    def flops(self) -> int:
        """2 D in each routed layer, for the causal read-out: the mean over all layers."""
        return 2 * self.config.width * self._routed // self.config.n_layers

    @property
    def weights_read(self) -> int:
        """D + 3 in each routed layer, of the causal read-out: the mean over all layers."""
        return (self.config.width + 3) * self._routed // self.config.n_layers


def _middle(r: Tensor, capacity: Tensor) -> Tensor:
    """(B, 1, 1) between the k-th and the next largest of r (B, T, 1), for capacities k / T (B,)."""
    t = r.shape[1]
    k = (capacity * t).round().long().clamp(min=1)[:, None, None]
    falling = r.sort(dim=1, descending=True).values
    return (falling.gather(1, k - 1) + falling.gather(1, k.clamp(max=t - 1))) / 2

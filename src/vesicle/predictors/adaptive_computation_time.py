"""Adaptive computation time: a token halts once its halting probabilities add up to 1 - epsilon.

After Graves 2016 (arXiv 1603.08983, section 2), token by token over layers as in the Universal
Transformer (Dehghani et al. 2018, arXiv 1807.03819). The halting probability p_l is the deficit of
the shared read-out of `base.py` with a linear drive,

    p_l   = sigmoid(w_l . h + b_l + s_l log((1 - delta) / delta) + position)        0 at delta = 1
    level = 2^(-(p_0 + ... + p_l) / (1 - epsilon))                           epsilon = 0.01

The level is 1/2 where the sum reaches 1 - epsilon and falls from layer to layer: with all steps of
serotonin at 1/2 a token that halts at layer l skips its FFN and all that follows. b_l starts at -3,
so that few tokens halt before training. The level has a slope everywhere, so that straight-through
masks teach tokens to halt sooner or later.

Ponder cost (the paper's tau times the number of steps and the remainder) is the trainer's price on
the executed share.

Not reproduced: the output is the state at which a token halts, not the mean of its states weighted
by halting probabilities; so there is no remainder. Layers have weights of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State

_EPSILON = 0.01
_SUM = -1
"""Where `state` has the sums (B, T, 1) on their way from layer to layer: no layer's number."""


class AdaptiveComputationTime(Predictor):
    """Serotonin from the halting probabilities of this layer and those before it."""

    kind = "act"

    def __init__(self, config: PredictorConfig) -> None:
        """Halting units w_l (1, D) of zero and b_l of -3.

        Raises:
            ValueError: If anything but serotonin is to be released.
        """
        if config.transmitters != ("serotonin",):
            raise ValueError(
                f"transmitters are {', '.join(config.transmitters)}; {self.kind!r} releases "
                "serotonin alone"
            )
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.n_layers, 1, config.width))
        nn.init.constant_(self.offset, -3.0)

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, 1): w_l times the normalised hidden state (B, T, D)."""
        return nn.functional.linear(feature, self.weight[layer])

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels (B, T, 1); the layers of a pass in their order."""
        total = 1 - super().release(layer, hidden, positions, dial, state)
        before = state.pop(_SUM, None)
        if layer > 0 and before is not None:
            total = before + total
        # Nothing is left after the last layer: a token has no part in the next one's sum.
        if layer < self.config.n_layers - 1:
            state[_SUM] = total
        return torch.exp2(-total / (1 - _EPSILON))

    @property
    def flops(self) -> int:
        """2 D FLOPs per token and layer, for the halting unit."""
        return 2 * self.config.width

"""Early exit: a token leaves at the first layer whose classifier is confident enough.

After Schuster et al. 2022 (CALM, arXiv 2207.07061, section 3). With h the normalised residual
stream after a layer's attention,

    c_l = sigmoid(w_l . h + b_l)

is the probability that the model would name the same likeliest token if it ended here. A token
exits once c_l exceeds lambda, and lambda is the dial delta itself: nothing is sure enough at 1.
With z(x) = log(x / (1 - x)),

    level = sigmoid(z(delta) - max(z(c_0), ..., z(c_l)))

is under 1/2 from the exit on and falls from layer to layer: with all steps of serotonin at 1/2 a
token that exits at layer l skips its FFN and all that follows. Keys and values of skipped layers
are computed from the state at the exit, as in the paper.

`training/early_exit.py` has what classifiers are trained for; the dial plays no part in it, and
which share it comes to is measured afterwards.

Not reproduced: calibration of lambda to a guaranteed quality (Learn then Test), and a lambda that
falls along a text. The paper has one classifier for all layers, here each has its own. Exits lie
between a layer's attention and its FFN instead of between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State

_HIGHEST = -1
"""Where `state` has the greatest z(c) (B, T, 1) of the layers so far: no layer's number."""


class EarlyExit(Predictor):
    """Serotonin from the greatest confidence of this layer and those before it."""

    kind = "calm"

    def __init__(self, config: PredictorConfig) -> None:
        """Classifiers w_l (1, D) and b_l of zero: every c is 1/2.

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
        # A classifier knows nothing of the dial, nor of positions.
        del self.log_slope, self.position_weight

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(..., 1): z(c_l) of the normalised hidden state (..., D)."""
        return nn.functional.linear(feature, self.weight[layer], self.offset[layer])

    def confidence(self, layer: int, hidden: Tensor) -> Tensor:
        """(...): z(c_l) of the residual stream (..., D) after `layer`'s self-attention."""
        feature = hidden.to(self.weight.dtype)
        feature = nn.functional.rms_norm(feature, (self.config.width,), eps=1e-6)
        return self.drive(layer, feature, {})[..., 0]

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels (B, T, 1); the layers of a pass in their order."""
        highest = self.confidence(layer, hidden)[..., None]
        before = state.pop(_HIGHEST, None)
        if layer > 0 and before is not None:
            highest = torch.maximum(before, highest)
        # Nothing is left after the last layer: a token has no part in the next one's exit.
        if layer < self.config.n_layers - 1:
            state[_HIGHEST] = highest
        rest = (dial >= 1)[:, None, None]
        needed = dial.to(highest.dtype).logit()[:, None, None]
        return torch.sigmoid(needed - highest).masked_fill(rest, 1.0)

    @property
    def flops(self) -> int:
        """2 D FLOPs per token and layer, for the classifier."""
        return 2 * self.config.width

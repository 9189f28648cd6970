"""Gain predictor: features measured against how strong they have lately been.

Neurons change their gain within moments to suit the signal's present spread. Duong et al. 2023,
"Adaptive coding efficiency in recurrent cortical circuits via gain control" (arXiv 2305.19869) and
"Adaptive whitening with fast gain modulation and slow synaptic plasticity" (arXiv 2308.13633), let
gains follow the context fast while weights learn slowly. The objective taken from there: in each
context, whatever its spread, responses have unit variance. With features u_t = U_l h_t,

    s_t     = lambda s_{t-1} + (1 - lambda) u_t^2       spread
    r_t     = u_t (s_{t-1} + epsilon)^(-gamma / 2)      response
    drive_t = V_l tanh(r_t)

The spread starts at 1 and forgets with a learnt decay lambda in (0, 1) per feature. A learnt gamma
in (0, 1) per feature says how far the gain follows: a spread of s leaves responses a variance of
s^(1 - gamma), which nears 1 as gamma does. The gain of a token comes from the tokens before it, so
that what is unusual stands out.

Not the papers': each feature is scaled alone. Their circuits share gains among neurons, so that
responses lose their correlations too, and reach the gains by gradient steps; an average is where
those steps lead for one feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.averages import smooth
from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_

_EPSILON = 1e-6
"""Bounds the gain at 1000 where a feature has been silent."""


class GainPredictor(Predictor):
    """M features, each divided by a power of its recent spread."""

    kind = "gain"
    remembers = True

    def __init__(self, config: PredictorConfig) -> None:
        """Random features, decays from about 2 to 200 tokens, gamma 1/2, zero read-outs."""
        super().__init__(config)
        n, m, a = config.n_layers, config.hidden, len(config.transmitters)
        self.inner = uniform_(torch.empty(n, m, config.width), config.width)
        self.decay = nn.Parameter(torch.linspace(0.0, 5.3, m).repeat(n, 1))
        self.exponent = nn.Parameter(torch.zeros(n, m))
        self.outer = nn.Parameter(torch.zeros(n, a, m))

    def responses(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, M): r of the normalised hidden state (B, T, D).

        The spread s (B, M) after the last token stays in `state[layer]` for the next chunk.
        """
        u = nn.functional.linear(feature, self.inner[layer])  # (B, T, M)
        before = state.get(layer)
        if before is None:
            before = torch.ones_like(u[:, 0])
        after = smooth(u.square(), torch.sigmoid(self.decay[layer]), before)
        state[layer] = after[:, -1].clone()  # a view would keep the whole chunk
        spread = torch.cat([before[:, None], after[:, :-1]], dim=1)
        return u * (spread + _EPSILON) ** (-torch.sigmoid(self.exponent[layer]) / 2)

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), read out of the responses."""
        return nn.functional.linear(self.responses(layer, feature, state).tanh(), self.outer[layer])

    @property
    def flops(self) -> int:
        """2 M (D + A), 4 M for the moving average and 4 M for squares and gains."""
        return 2 * self.config.hidden * (self.config.width + len(self.config.transmitters) + 4)

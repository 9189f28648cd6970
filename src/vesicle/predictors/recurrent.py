"""Recurrent predictor: slow tonic plus fast phasic release.

Real neuromodulators work on two time scales: a slowly varying tonic level sets the background,
brief phasic bursts answer single events. Here, with features u_t = U_l h_t,

    m_t = lambda m_{t-1} + (1 - lambda) u_t      tonic, one learnt decay lambda in (0, 1) per
    feature drive_t = P_l tanh(u_t) + Q_l tanh(m_t)      phasic + tonic

A chunk of T tokens is computed with a (T, T) matrix of decays rather than a loop; the state m
carries over, so chunks, single tokens and the whole sequence agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.averages import smooth
from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_


class RecurrentPredictor(Predictor):
    """Tonic and phasic read-outs of M shared features per layer."""

    kind = "recurrent"
    remembers = True

    def __init__(self, config: PredictorConfig) -> None:
        """Random features with decays from about 2 to 200 tokens, zero read-outs."""
        super().__init__(config)
        n, m, a = config.n_layers, config.hidden, len(config.transmitters)
        self.inner = uniform_(torch.empty(n, m, config.width), config.width)
        self.decay = nn.Parameter(torch.linspace(0.0, 5.3, m).repeat(n, 1))
        self.phasic = nn.Parameter(torch.zeros(n, a, m))
        self.tonic = nn.Parameter(torch.zeros(n, a, m))

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), phasic and tonic, from the normalised hidden state (B, T, D).

        The averages m (B, M) after the last token stay in `state[layer]` for the next chunk.
        """
        u = nn.functional.linear(feature, self.inner[layer])  # (B, T, M)
        decay = torch.sigmoid(self.decay[layer])
        carried = state.get(layer)
        if carried is None:
            carried = torch.zeros_like(u[:, 0])
        slow = smooth(u, decay, carried)
        state[layer] = slow[:, -1].clone()  # a view would keep the whole chunk
        return nn.functional.linear(u.tanh(), self.phasic[layer]) + nn.functional.linear(
            slow.tanh(), self.tonic[layer]
        )

    @property
    def flops(self) -> int:
        """2 M (D + 2 A) and 4 M for the moving average."""
        return 2 * self.config.hidden * (self.config.width + 2 * len(self.config.transmitters) + 2)

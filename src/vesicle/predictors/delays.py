"""Delays predictor: features of earlier tokens, each after delays that are learnt.

Signals that leave at different times can arrive together, if the slower paths start earlier.
Grimaldi and Perrinet 2023, "Learning heterogeneous delays in a layer of spiking neurons for fast
motion detection" (arXiv 2307.14077), learn which delays to wait for, and so detect motifs in time.
With features u_t = U_l h_t and R = 16 taps,

    drive_t = V_l tanh(sum over k from 0 to R - 1 of w_{m,k} u_{m,t-k})
    w_{m,k} = sum over j of a_{m,j} exp(-(k - d_{m,j})^2 / 2)

Each feature has J = 2 Gaussians of width 1 token, at learnt delays d in (0, R - 1) and of learnt
heights a. Delays start spread evenly over that range, so that no two features look at the same
past. Before a text begins, features are 0.

Not the paper's: it has spikes, one free weight per input and delay, and a logistic regression over
them; here a delay is a number of its own, so that gradients move it. As in the paper, most taps can
be pruned afterwards.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_

TAPS = 16
"""R: the token itself and those before it that a feature can reach."""
_DELAYS = 2
"""J: Gaussians of a feature."""


class DelaysPredictor(Predictor):
    """M features, each filtered along the text by a few learnt delays.

    Attributes:
        kept: (L, M, R) whether a tap is read; all of them, unless pruned.
    """

    kind = "delays"
    remembers = True
    kept: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        """Random features, delays spread over the taps, zero read-outs."""
        super().__init__(config)
        n, m, a = config.n_layers, config.hidden, len(config.transmitters)
        self.inner = uniform_(torch.empty(n, m, config.width), config.width)
        self.height = nn.Parameter(torch.full((n, m, _DELAYS), 1 / _DELAYS))
        # As a share of the longest, and through a logit: a delay cannot leave the taps, where no
        # gradient would bring it back.
        count = _DELAYS * m
        share = ((torch.arange(count) + 0.5) / count).reshape(_DELAYS, m).T
        self.place = nn.Parameter(share.logit().repeat(n, 1, 1))
        self.outer = nn.Parameter(torch.zeros(n, a, m))
        self.register_buffer("kept", torch.ones(n, m, TAPS, dtype=torch.bool))

    def delays(self, layer: int) -> Tensor:
        """(M, J): d, in tokens."""
        return (TAPS - 1) * torch.sigmoid(self.place[layer])

    def taps(self, layer: int) -> Tensor:
        """(M, R): w by delay, 0 where pruned."""
        lag = torch.arange(TAPS, device=self.place.device, dtype=self.place.dtype)
        distance = lag - self.delays(layer)[..., None]  # (M, J, R)
        bumps = torch.exp(-distance.square() / 2)
        return (self.height[layer][..., None] * bumps).sum(dim=1) * self.kept[layer]

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), read out of filtered features of the normalised hidden state (B, T, D).

        The last R - 1 features (B, R - 1, M) stay in `state[layer]` for the next chunk.
        """
        u = nn.functional.linear(feature, self.inner[layer])  # (B, T, M)
        past = state.get(layer)
        if past is None:
            past = u.new_zeros(len(u), TAPS - 1, u.shape[-1])
        reach = torch.cat([past, u], dim=1)
        state[layer] = reach[:, -(TAPS - 1) :].clone()  # a view would keep the whole chunk
        # A product and not a convolution, which GPUs round to TF32 unless told otherwise.
        windows = reach.unfold(1, TAPS, 1)  # (B, T, M, R), the token itself last
        filtered = torch.einsum("btmr,mr->btm", windows, self.taps(layer).flip(-1))
        return nn.functional.linear(filtered.tanh(), self.outer[layer])

    def pruned(self, keep: int) -> DelaysPredictor:
        """A copy in which each feature reads its `keep` largest taps alone.

        Taps are masked and not skipped: the copy's quality is that of a pruned predictor, its cost
        is not. What was pruned stays so, also in training and in a copy of the copy.

        Raises:
            ValueError: If `keep` is not from 1 to R.
        """
        if not 1 <= keep <= TAPS:
            raise ValueError(f"keep is {keep}; allowed: 1 to {TAPS}")
        other = copy.deepcopy(self)
        taps = torch.stack([self.taps(layer) for layer in range(self.config.n_layers)])
        largest = taps.detach().abs().topk(keep, dim=-1).indices
        other.kept = self.kept & torch.zeros_like(self.kept).scatter(-1, largest, True)
        return other

    @property
    def flops(self) -> int:
        """2 M (D + R + A) FLOPs per token and layer; taps are made once a chunk.

        Making them is not counted, although decoding does so for every token.
        """
        return 2 * self.config.hidden * (self.config.width + TAPS + len(self.config.transmitters))

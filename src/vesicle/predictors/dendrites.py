"""Dendrites predictor: units that speak up where one of their segments knows the pattern.

A pyramidal cell recognises patterns on short stretches of dendrite: a segment with few synapses
spikes when enough of the cells that it listens to are active at once. Ahmad and Hawkins 2016, "How
do neurons operate on sparse distributed representations?" (arXiv 1601.00720), derive how high its
threshold must be for random patterns not to set it off (`sparse_codes.py`). With z the sparse code
of the hidden state h, and i(m, j, k) the k-th feature that segment j of unit m listens to,

    z_d     = sigmoid((h_d - cut) / 0.1), cut midway between the D/8-th largest feature and the next
    o_{m,j} = sum over k of p_{m,j,k} z_{i(m,j,k)}                     overlap of a segment
    g_m     = sigmoid(max over j of o_{m,j} - theta)                   the strongest segment gates
    drive   = V_l (g * U_l h)

Each unit has 4 segments of D/16 features, drawn once and kept. Strengths p start at 1, so that an
overlap begins as the theory's count; theta is the least threshold that a random code of D/8
features reaches in a segment with probability at most 0.05.

Not the paper's: its codes and segments are binary; here both are soft, so that gradients pass and a
rounding error moves a level by no more than itself. That the strongest segment multiplies a linear
unit follows Iyer et al. 2022 (arXiv 2201.00042), where a task's context drives the segments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.predictors.base import Predictor, PredictorConfig, State, uniform_
from vesicle.predictors.sparse_codes import least_threshold

SEGMENTS = 4
"""Of a unit."""
_MOST = 0.05
"""Probability that a random code activates a segment, at most."""
_SOFTNESS = 0.1
"""Of the code's edge, in units of the normalised hidden state, whose features have a rms of 1."""
_SEED = 1601
"""Of the draw of synapses."""
_SPAN = 64
"""Tokens whose synapses are looked up at once: a token has M D / 4 of them."""


class DendritesPredictor(Predictor):
    """M linear units, each gated by the strongest of its segments.

    Attributes:
        active: Features that are on in a code.
        threshold: Overlap at which a segment is half active.
        synapses: (L, M, S, K) features that segments listen to; fixed, and saved with the rest.
    """

    kind = "dendrites"
    synapses: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        """Random units, synapses drawn from a fixed seed, zero read-outs."""
        super().__init__(config)
        n, m, a, d = config.n_layers, config.hidden, len(config.transmitters), config.width
        size = max(1, d // 16)
        self.active = max(1, d // 8)
        # No higher than a whole match: where D is tiny, even that is not rare enough.
        self.threshold = min(least_threshold(d, self.active, size, _MOST), size)
        self.inner = uniform_(torch.empty(n, m, d), d)
        self.strength = nn.Parameter(torch.ones(n, m, SEGMENTS, size))
        self.outer = nn.Parameter(torch.zeros(n, a, m))
        generator = torch.Generator().manual_seed(_SEED)
        order = torch.rand(n, m, SEGMENTS, d, generator=generator).argsort(dim=-1)
        self.register_buffer("synapses", order[..., :size].contiguous())

    def code(self, feature: Tensor) -> Tensor:
        """(B, T, D): z of the normalised hidden state, in (0, 1); `active` of them above 1/2."""
        n = min(self.active + 1, self.config.width)
        cut = feature.topk(n, dim=-1).values[..., -2:].mean(dim=-1, keepdim=True)
        return torch.sigmoid((feature - cut) / _SOFTNESS)

    def overlaps(self, layer: int, code: Tensor) -> Tensor:
        """(B, T, M, S): o of the layer's segments with a code (B, T, D)."""
        pieces = [
            torch.einsum("btmsk,msk->btms", piece[..., self.synapses[layer]], self.strength[layer])
            for piece in code.split(_SPAN, dim=1)
        ]
        return torch.cat(pieces, dim=1)

    def drive(self, layer: int, feature: Tensor, state: State) -> Tensor:
        """(B, T, A), read out of M gated units on the normalised hidden state (B, T, D)."""
        strongest = self.overlaps(layer, self.code(feature)).amax(dim=-1)  # (B, T, M)
        units = nn.functional.linear(feature, self.inner[layer])
        return nn.functional.linear(
            units * torch.sigmoid(strongest - self.threshold), self.outer[layer]
        )

    @property
    def flops(self) -> int:
        """2 M (D + S K + A) + 2 D FLOPs per token and layer: units, segments, read-outs, code."""
        width, (_, m, s, k) = self.config.width, self.strength.shape
        return 2 * m * (width + s * k + len(self.config.transmitters)) + 2 * width

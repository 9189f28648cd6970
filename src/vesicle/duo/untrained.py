"""Small modules that are made of a pretrained FFN's own weights, with nothing trained.

- *Nested*: the hidden units that matter most, as MatFormer (Devvrit et al. 2023, arXiv 2310.07707)
  and Nemotron Elastic order them. A unit with activation h and output column d matters by
  Σ_t |h_t d|² / |r_t|², r the residual stream.
- *Jacobian*: y ~ J (x - E x) + E y with J = E ∂y/∂x over tokens, cut to a rank so that least is
  lost on the inputs seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.activations import hidden_units
from vesicle.duo.ffn_inputs import Seen, watched
from vesicle.errors import ModelError
from vesicle.families import find_family
from vesicle.small_modules import LowRankMaps, SmallFfn


@dataclass(frozen=True, kw_only=True)
class OwnFfns:
    """Weights of all FFNs of a model.

    Attributes:
        ffn_in: (L, D, 2 F) the gate's columns, then the others; (L, D, F) without a gate.
        ffn_out: (L, F, D).
        activation: Of hidden units, by its name in `activations.ACTIVATIONS`.
        gated: Whether a gate multiplies them.
    """

    ffn_in: Tensor
    ffn_out: Tensor
    activation: str
    gated: bool

    @property
    def units(self) -> int:
        """F."""
        return int(self.ffn_out.shape[1])

    def inner(self, layer: int, x: Tensor) -> Tensor:
        """(N, F) activations of the hidden units of `layer` for x (N, D)."""
        return hidden_units(x @ self.ffn_in[layer], self.activation, self.gated)


@torch.no_grad()
def own_ffns(model: nn.Module) -> OwnFfns:
    """The FFNs of a Hugging Face causal LM, in fp32.

    Raises:
        ModelError: They have biases, or norms of what they give: small modules have neither.
    """
    config: Any = model.config
    family = find_family(config)
    decoder, presence = family.decoder_config(config), family.presence(config)
    if presence.ffn_bias or presence.post_norm:
        raise ModelError(
            f"FFNs of {config.model_type} have {'biases' if presence.ffn_bias else 'post-norms'}; "
            "small FFNs are made for models without"
        )
    parts = [family.modules(layer) for layer in family.layers(model)]
    return OwnFfns(
        ffn_in=torch.stack([torch.cat([w.weight for w in p.ffn_in]).T.float() for p in parts]),
        ffn_out=torch.stack([p.ffn_out.weight.T.float() for p in parts]),
        activation=decoder.activation,
        gated=decoder.shape.gated,
    )


@torch.no_grad()
def importance(model: nn.Module, own: OwnFfns, batches: Iterable[Tensor]) -> Tensor:
    """(L, F) how much each hidden unit matters on windows (B, T) of token ids."""
    found = torch.zeros(own.ffn_out.shape[:2])
    lengths = own.ffn_out.square().sum(-1)  # (L, F)
    with watched(model) as read:
        for windows in batches:
            for layer, seen in enumerate(read(windows)):
                h = own.inner(layer, seen.x.float())
                found[layer] += (h.square() * seen.weight).sum(0) * lengths[layer]
    return found


@torch.no_grad()
def nested(own: OwnFfns, matters: Tensor, units: int) -> SmallFfn:
    """The `units` hidden units of each FFN that matter most by (L, F), in falling order.

    Raises:
        ModelError: There are not so many.
    """
    n_layers, width, _ = own.ffn_in.shape
    if not 1 <= units <= own.units:
        raise ModelError(f"{units} hidden units; allowed: 1 to {own.units}, those of the model")
    small = SmallFfn(n_layers, width, units, activation=own.activation, gated=own.gated)
    for layer in range(n_layers):
        best = matters[layer].topk(units).indices
        columns = torch.cat([best, own.units + best]) if own.gated else best
        small.ffn_in[layer] = own.ffn_in[layer][:, columns]
        small.ffn_out[layer] = own.ffn_out[layer][best]
    return small


def jacobian(model: nn.Module, own: OwnFfns, batches: Iterable[Tensor], rank: int) -> LowRankMaps:
    """Maps of mean Jacobians, cut to a rank.

    Args:
        model: A Hugging Face causal LM.
        own: Its FFNs.
        batches: Windows (B, T) of token ids.
        rank: Of the maps.

    Raises:
        ModelError: The rank is not from 1 to the width.
    """
    n_layers, width, _ = own.ffn_in.shape
    if not 1 <= rank <= width:
        raise ModelError(f"rank is {rank}; allowed: 1 to {width}, the model's width")
    sums = [_Sums.zero(width, own.ffn_in.shape[2]) for _ in range(n_layers)]
    with watched(model) as read:
        for windows in batches:
            for layer, seen in enumerate(read(windows)):
                sums[layer].add(own, layer, seen)
    maps = LowRankMaps(n_layers, width, rank)
    for layer, found in enumerate(sums):
        mean_x, mean_y = found.x / found.n, found.y / found.n
        spread = found.xx / found.n - mean_x[:, None] * mean_x
        slopes = own.ffn_in[layer].double() * (found.slopes / found.n)  # (D, F or 2 F)
        parts = slopes.chunk(2, dim=-1) if own.gated else (slopes,)
        whole = sum(parts[1:], parts[0]) @ own.ffn_out[layer].double()  # J', (D in, D out)
        _, vectors = torch.linalg.eigh(whole.T @ spread @ whole)  # eigenvalues rise
        up = vectors[:, -rank:].flip(-1)
        down = (whole @ up).T
        with torch.no_grad():
            maps.down[layer].copy_(down)
            maps.up[layer].copy_(up)
            maps.bias[layer].copy_(mean_y - up @ (down @ mean_x))
    return maps


@dataclass(kw_only=True)
class _Sums:
    """Over tokens: x, y, x x', and how the FFN's inner activations change with each column."""

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    slopes: Tensor

    @classmethod
    def zero(cls, width: int, columns: int) -> _Sums:
        """No tokens yet."""
        x, y = torch.zeros(2, width, dtype=torch.float64)
        xx = torch.zeros(width, width, dtype=torch.float64)
        return cls(n=0, x=x, y=y, xx=xx, slopes=torch.zeros(columns, dtype=torch.float64))

    def add(self, own: OwnFfns, layer: int, seen: Seen) -> None:
        x = seen.x.float()
        with torch.enable_grad():
            inner = (x @ own.ffn_in[layer]).requires_grad_()
            h = hidden_units(inner, own.activation, own.gated)
            (slopes,) = torch.autograd.grad(h.sum(), inner)
        self.n += len(x)
        self.slopes += slopes.double().sum(0)
        self.x += x.double().sum(0)
        self.y += seen.y.double().sum(0)
        self.xx += (x.T @ x).double()

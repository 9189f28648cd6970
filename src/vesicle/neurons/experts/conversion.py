"""From an MLP to experts and back: hidden units are split into groups, and no weight changes.

    MLP(x) = act(x A) B = Σ_j act(x A_j) B_j          A = [A_1 ... A_M], B = [B_1; ...; B_M]

so that a layer of M experts whose gates are 1 gives exactly what the MLP gives where all M run, and
an approximation where a token runs k of them ("MoEfication", Zhang et al. 2022). Units are split

- `cluster`: into groups of equal size whose input weights point the same way (balanced k-means),
- `order`: as they stand, or `random`ly: controls.

Routers of a converted layer are fitted (`fit_router`, by ridge regression: how large will be what
each expert gives?), or MoE-X's, which reads the weights.

`as_small_ffn` makes of some experts of each layer the small FFNs among which a Plan chooses: in the
field `ffn` 2 is the whole layer, 1 these experts, 0 neither.

Not reproduced: MoE-X's own conversion ("up-cycling" in its table 4), which copies a dense FFN into
each expert and trains on; it needs as many units an expert as the FFN has, and so costs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import ModelError
from vesicle.families import find_family
from vesicle.neurons.experts.layer import ExpertFfn, ExpertSize
from vesicle.neurons.experts.regression import regression
from vesicle.neurons.experts.routing import FixedRouter, Router, TopKRouter, check_experts
from vesicle.small_modules import SmallFfn

SPLITS = ("cluster", "order", "random")
_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A dense FFN's weights.

    Attributes:
        ffn_in: (D, F), or (D, 2 F) with the columns of the gate first.
        ffn_out: (F, D).
        activation: By its name in `activations.ACTIVATIONS`.
        gated: Whether there is a gate.
    """

    ffn_in: Tensor
    ffn_out: Tensor
    activation: str
    gated: bool


def mlp_of(model: Any, layer: int) -> Mlp:
    """The FFN of a layer of a Hugging Face causal LM, or of a decoder of experts: their wide MLP.

    Raises:
        ModelError: There is no such layer, its FFN has biases, or its experts are gated by scores.
    """
    family = find_family(model.config)
    layers = family.layers(model)
    if not 0 <= layer < len(layers):
        raise ModelError(f"layer is {layer}; allowed: 0 to {len(layers) - 1}")
    for part in layers[layer].modules():
        if isinstance(part, ExpertFfn):
            if part.size.n_experts > 1:
                raise ModelError(f"layer {layer} has experts already; allowed: a dense FFN")
            wide, size = part.as_wide_mlp(), part.size
            return Mlp(
                ffn_in=wide.ffn_in.detach(),
                ffn_out=wide.ffn_out.detach(),
                activation=size.activation,
                gated=size.gated,
            )
    modules, config = family.modules(layers[layer]), family.decoder_config(model.config)
    linears = (*modules.ffn_in, modules.ffn_out)
    if any(linear.bias is not None for linear in linears):
        raise ModelError(f"the FFN of layer {layer} has biases; allowed: FFNs without")
    return Mlp(
        ffn_in=torch.cat([linear.weight.detach().T for linear in modules.ffn_in], 1),
        ffn_out=modules.ffn_out.weight.detach().T,
        activation=config.activation,
        gated=len(modules.ffn_in) == 2,
    )


def to_experts(
    mlp: Mlp,
    n_experts: int,
    n_active: int,
    router: Router | None = None,
    *,
    split: str = "cluster",
    seed: int = 0,
) -> ExpertFfn:
    """A layer of experts with the MLP's hidden units.

    Args:
        mlp: Dense.
        n_experts: M; has to divide its units.
        n_active: k.
        router: Who chooses, with gates of 1; learnt scores, to be fitted, if not given.
        split: One of `SPLITS`.
        seed: Of the split, and of a router that is not given.

    Raises:
        ValueError: The units cannot be shared evenly, or there is no such split.
    """
    width, n_units = mlp.ffn_in.shape[0], len(mlp.ffn_out)
    if n_experts < 1 or n_units % n_experts:
        raise ValueError(f"n_experts is {n_experts}; allowed: divisors of {n_units} hidden units")
    size = ExpertSize(
        width=width,
        n_experts=n_experts,
        n_active=n_active,
        units=n_units // n_experts,
        activation=mlp.activation,
        gated=mlp.gated,
    )
    groups = split_units(mlp.ffn_in[:, :n_units], n_experts, split, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = ExpertFfn(
            size, router or TopKRouter(width, n_experts, n_active, weighted=False)
        ).to(mlp.ffn_in)
    with torch.no_grad():
        halves = mlp.ffn_in.split(n_units, dim=1)
        for number, units in enumerate(groups):
            layer.ffn_in[number] = torch.cat([half[:, units] for half in halves], 1)
            layer.ffn_out[number] = mlp.ffn_out[units]
    return layer


def split_units(encoder: Tensor, n_groups: int, split: str, seed: int) -> list[Tensor]:
    """Numbers of hidden units, in groups of equal size.

    Args:
        encoder: (D, F) input weights.
        n_groups: Has to divide F.
        split: One of `SPLITS`.
        seed: Of `random` and of where clusters begin.

    Raises:
        ValueError: There is no such split.
    """
    n_units = encoder.shape[1]
    rng = np.random.default_rng(seed)
    if split == "order":
        return list(torch.arange(n_units).chunk(n_groups))
    if split == "random":
        return list(torch.from_numpy(rng.permutation(n_units)).chunk(n_groups))
    if split != "cluster":
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    points = torch.nn.functional.normalize(encoder.float().T, dim=1)  # (F, D)
    centres = points[torch.from_numpy(rng.permutation(n_units)[:n_groups])]
    groups = list[Tensor]()
    for _ in range(_ROUNDS):
        groups = _balanced(points @ centres.T)
        means = torch.stack([points[units].mean(0) for units in groups])
        centres = torch.nn.functional.normalize(means, dim=1)
    return groups


def fit_router(layer: ExpertFfn, x: Tensor, ridge: float = 1e-2) -> None:
    """Fit the learnt scores of a layer to how large is what each expert gives, in place.

    Args:
        layer: With a `TopKRouter`.
        x: (N, D) what the layer is given on some text.
        ridge: Share of the mean variance of x that is added to each direction's.

    Raises:
        ModelError: It has another router.
    """
    if not isinstance(layer.router, TopKRouter):
        raise ModelError(f"the router is a {type(layer.router).__name__}; allowed: TopKRouter")
    with torch.no_grad():
        sizes = [layer.expert(j, x).norm(dim=1) for j in range(layer.size.n_experts)]
        targets = torch.stack(sizes, 1)  # (N, M)
        weight, bias = regression(x, targets, ridge)
        layer.router.weight.copy_(weight)
        layer.router.bias.copy_(bias)


def restricted(layer: ExpertFfn, experts: Sequence[int]) -> ExpertFfn:
    """A layer that gives every token the same experts, each with gate 1; weights are shared.

    Raises:
        ValueError: There are none, or one is out of range or twice there.
    """
    found = ExpertFfn(layer.size, FixedRouter(layer.size.n_experts, experts))
    found.ffn_in, found.ffn_out = layer.ffn_in, layer.ffn_out
    return found


def as_small_ffn(
    layers: Sequence[ExpertFfn],
    experts: Sequence[Sequence[int]],
    gates: Sequence[Sequence[float]] | None = None,
) -> SmallFfn:
    """Small FFNs made of some experts of each layer, to stand beside the whole ones.

    Args:
        layers: All L layers of a model.
        experts: Of each layer, as many.
        gates: Of each of them, a part of the output weights then; 1 if not given.

    Returns:
        What a modulator takes as `ffn_standin`; layer by layer it computes what `restricted` does.

    Raises:
        ValueError: Layers differ in form, or have other numbers of experts.
    """
    forms = {(layer.size.width, layer.size.activation, layer.size.gated) for layer in layers}
    counts = {
        len(numbers) * layer.size.units for numbers, layer in zip(experts, layers, strict=True)
    }
    if len(forms) != 1 or len(counts) != 1:
        raise ValueError(
            f"layers have {len(forms)} forms, their experts {sorted(counts)} units; allowed: one "
            "form, and as many units in each layer"
        )
    width, activation, gated = forms.pop()
    found = SmallFfn(len(layers), width, counts.pop(), activation=activation, gated=gated)
    for number, (layer, chosen) in enumerate(zip(layers, experts, strict=True)):
        kept = list(check_experts(chosen, layer.size.n_experts))
        each = torch.tensor(gates[number] if gates is not None else [1.0] * len(kept))
        halves = layer.ffn_in.detach()[kept].split(layer.size.units, dim=2)
        joined = [half.transpose(0, 1).flatten(1) for half in halves]
        found.ffn_in[number] = torch.cat(joined, 1)
        found.ffn_out[number] = (layer.ffn_out.detach()[kept] * each[:, None, None]).flatten(0, 1)
    return found


def _balanced(likeness: Tensor) -> list[Tensor]:
    """Units in groups of equal size, the surest first, each where it fits best and there is room.

    Args:
        likeness: (F, M) of each unit to each group.
    """
    n_units, n_groups = likeness.shape
    room = [n_units // n_groups] * n_groups
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    ranked = likeness.argsort(1, descending=True).tolist()
    top = likeness.topk(min(2, n_groups), dim=1).values
    for unit in (top[:, 0] - top[:, -1]).argsort(descending=True).tolist():
        group = next(g for g in ranked[unit] if room[g])
        groups[group].append(unit)
        room[group] -= 1
    return [torch.tensor(sorted(units)) for units in groups]

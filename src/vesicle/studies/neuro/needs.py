"""What tokens need, told to read-outs: local errors of cheaper modules, as labels.

For a layer's FFN f with normed input x, half(x) the half of its channels that is largest, and m(x)
the map that stands in for f,

    dopamine:   e = |f(half(x)) - f(x)|² / |f(x)|²
    serotonin:  e = |m(x) - f(x)|² / |f(x)|²

and a token needs more (t = -1) where e is above the median of the batch's tokens in that layer. The
drive d of a transmitter, which lowers its level, is held to t by

    cross-entropy:  log(1 + exp(-t d))
    margin:         max(0, 1 - t d)²     (a linear support vector machine; Tang 2013, Agarap 2017)

GABA has no such local error, and keeps a drive of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vesicle.predictors import Predictor

if TYPE_CHECKING:
    from vesicle.studies.neuro.subject import Subject


def needs_loss(subject: Subject, ids: Tensor, kind: str) -> Tensor:
    """Mean loss of read-outs on the dense pass of ids (B, T).

    Args:
        subject: With a modulator; gradients reach its predictor alone.
        ids: Texts.
        kind: `cross-entropy` or `margin`.
    """
    modulator = subject.modulator
    assert modulator is not None
    assert isinstance(modulator.predictor, Predictor)
    predictor, total = modulator.predictor, torch.zeros(())
    told = [n for n in ("dopamine", "serotonin") if n in predictor.config.transmitters]
    for layer, (hidden, x, out) in enumerate(_dense_pass(subject, ids)):
        feature = nn.functional.rms_norm(hidden, (hidden.shape[-1],), eps=1e-6)
        drive = predictor.drive(layer, feature, {})
        for name in told:
            with torch.no_grad():
                if name == "dopamine":
                    cheap = subject.model.model.layers[layer].mlp(_larger_half(x))
                else:
                    cheap = modulator.ffn_standin.apply_layer(layer, x)
                error = (cheap - out).square().sum(-1) / out.square().sum(-1).clamp_min(1e-9)
                wanted = torch.where(error > error.median(), -1.0, 1.0)
            agrees = wanted * drive[..., predictor.config.transmitters.index(name)]
            if kind == "margin":
                total = total + (1 - agrees).clamp_min(0).square().mean()
            else:
                total = total + nn.functional.softplus(-agrees).mean()
    return total / (max(1, len(told)) * predictor.config.n_layers)


@torch.no_grad()
def _dense_pass(subject: Subject, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer the residual stream, the FFN's normed input and its output, (B, T, D) each."""
    layers, seen = subject.model.model.layers, list[tuple[Tensor, Tensor, Tensor]]()
    residual = dict[int, Tensor]()
    handles = []
    for number, layer in enumerate(layers):

        def before(module: nn.Module, args: tuple[Tensor], number: int = number) -> None:
            residual[number] = args[0]

        def after(
            module: nn.Module, args: tuple[Tensor], out: Tensor, number: int = number
        ) -> None:
            seen.append((residual[number], args[0], out))

        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(before))
        handles.append(layer.mlp.register_forward_hook(after))
    try:
        subject.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _larger_half(x: Tensor) -> Tensor:
    magnitude = x.abs()
    return x * (magnitude >= magnitude.median(-1, keepdim=True).values)

"""Warm start: read-outs fitted by forward passes alone, before any gradient step.

For each layer and token, how much do cheaper modules err on this token, compared with others?

- Dopamine: e(t, c) is the relative error of the FFN's output when it reads the share c of its input
  and inner channels. The token's level is where log e, interpolated over three shares, equals the
  layer's mean of log e at the middle share; the label is minus its logit, so that tokens that
  tolerate more get a larger deficit.
- Serotonin: the label is minus the log relative error of the FFN's stand-in.
- Other transmitters have no local error and keep a drive of zero.

Labels are centred per layer and regressed, with a ridge, on what the predictor's last linear map
reads: the normalised hidden state (`linear`), or its random features as they stand (`mlp`,
`recurrent`). Means go to the offset, so that the layer's mean drive stays zero and the static
allocation keeps its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.calibration.standins import Moments
from vesicle.effectors import DopaminePrecision
from vesicle.effectors.dopamine_precision import largest
from vesicle.errors import VesicleError
from vesicle.families import find_family
from vesicle.families.base import LayerModules
from vesicle.modulator import Modulator
from vesicle.predictors import Predictor
from vesicle.predictors.linear import LinearPredictor
from vesicle.predictors.mlp import MlpPredictor
from vesicle.predictors.recurrent import RecurrentPredictor

LEVELS = (0.4, 0.6, 0.8)
_TINY = 1e-8


def warm_start(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    ridge: float = 0.1,
    strength: float = 1.0,
) -> None:
    """Set the read-outs of a modulator's predictor in place.

    Args:
        model: A Hugging Face causal LM.
        modulator: Its stand-ins should be fitted already.
        windows: (N, T) token ids.
        ridge: Penalty, as a share of the features' mean variance.
        strength: Factor on the fitted drive.

    Raises:
        VesicleError: If the predictor is of a kind that cannot be fitted so.
    """
    predictor = modulator.predictor
    if not isinstance(predictor, LinearPredictor | MlpPredictor | RecurrentPredictor):
        raise VesicleError(
            f"a {predictor.kind!r} predictor cannot be warm-started; "
            "allowed: linear, mlp, recurrent"
        )
    columns = {name: a for a, name in enumerate(predictor.config.transmitters)}
    config: Any = model.config
    family = find_family(config)
    if family.decoder_config(config).parallel_residual:
        raise VesicleError("a warm start needs a model whose FFN follows its attention")
    device = next(model.parameters()).device
    moments: list[Moments] = []
    handles: list[Any] = []
    try:
        for layer, block in enumerate(family.layers(model)):
            modules = family.modules(block)
            features = _features(predictor, layer)
            part = Moments(features(torch.zeros(1, 2, predictor.config.width)).shape[-1], 2, device)
            moments.append(part)
            listener = _Listener(modulator, layer, modules, features, part)
            handles.append(modules.ffn_norm.register_forward_pre_hook(listener.hear))
            handles.append(modules.ffn.register_forward_hook(listener.measure))
        with torch.no_grad():
            for window in windows:
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for layer, part in enumerate(moments):
            weights = part.regress(ridge)[0] * strength  # (M, 2)
            for row, name in enumerate(("dopamine", "serotonin")):
                if name in columns:
                    _read_out(predictor, layer)[columns[name]] = weights[:, row].to(torch.float32)
                    shift = weights[:, row] @ (part.x / part.n)
                    predictor.offset[layer, columns[name]] -= shift.to(torch.float32)


class _Listener:
    """Hears one layer's hidden state and FFN, tries cheaper FFNs and keeps the moments."""

    def __init__(
        self,
        modulator: Modulator,
        layer: int,
        modules: LayerModules,
        features: Callable[[Tensor], Tensor],
        part: Moments,
    ) -> None:
        self.modulator, self.layer, self.modules = modulator, layer, modules
        self.features, self.part = features, part
        self.hidden = torch.zeros(0)

    def hear(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.hidden = args[0]

    def measure(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        effector = self.modulator.dopamine
        size = output.float().norm(dim=-1).clamp(min=_TINY)
        errors = []
        for level in LEVELS:
            cut = self.modules.ffn_out.register_forward_pre_hook(
                lambda _, inner, level=level: (_keep(inner[0], level, 3, effector),)
            )
            try:
                # `forward` itself: calling the module would call this hook again.
                cheap = module.forward(_keep(args[0], level, 2, effector))
            finally:
                cut.remove()
            errors.append((cheap - output).float().norm(dim=-1) / size)
        dopamine = -_level_of_mean(torch.stack(errors).clamp(min=_TINY).log()).logit()
        small = self.modulator.ffn_standin.apply_layer(self.layer, args[0])
        serotonin = -((small - output).float().norm(dim=-1) / size).clamp(min=_TINY).log()
        labels = torch.stack([dopamine, serotonin], dim=-1)[:, 1:]  # (B, T - 1, 2)
        self.part.add(self.features(self.hidden)[:, 1:].flatten(0, 1), labels.flatten(0, 1))


def _level_of_mean(errors: Tensor) -> Tensor:
    """Where log errors (3, B, T), falling with the level, equal the middle level's mean; (B, T)."""
    target = errors[1].mean()
    low, middle, high = errors
    step = LEVELS[1] - LEVELS[0]
    below = LEVELS[1] - step * (target - middle) / (low - middle).clamp(min=_TINY)
    above = LEVELS[1] + step * (middle - target) / (middle - high).clamp(min=_TINY)
    return torch.where(middle > target, above, below).clamp(0.05, 0.95)


def _keep(x: Tensor, level: float, site: int, effector: DopaminePrecision) -> Tensor:
    count = max(round(float(effector.share(torch.tensor(level), site)) * x.shape[-1]), 1)
    threshold = largest(x.abs(), torch.full(x.shape[:-1], count, device=x.device))
    return torch.where(x.abs() >= threshold, x, torch.zeros_like(x))


def _read_out(predictor: Predictor, layer: int) -> Tensor:
    """The last linear map (A, M), to be written to."""
    if isinstance(predictor, LinearPredictor):
        return predictor.weight[layer]
    if isinstance(predictor, MlpPredictor):
        return predictor.outer[layer]
    assert isinstance(predictor, RecurrentPredictor)
    return predictor.phasic[layer]


def _features(predictor: Predictor, layer: int) -> Callable[[Tensor], Tensor]:
    """From hidden states (B, T, D) to what the last linear map reads (B, T, M)."""

    def features(hidden: Tensor) -> Tensor:
        feature = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
        if isinstance(predictor, MlpPredictor):
            return nn.functional.gelu(nn.functional.linear(feature, predictor.inner[layer]))
        if isinstance(predictor, RecurrentPredictor):
            return nn.functional.linear(feature, predictor.inner[layer]).tanh()
        return feature

    return features

"""What each level costs and saves when it alone is lowered, and a static allocation made from that.

A *probe* lowers one transmitter in one layer for every token, all else at rest, under the hard
reference:

    rise  = KL(dense || probed) per token, in nats
    saved = 1 - executed / dense FLOPs

KL is never negative and is what training minimises; the rise in loss drowns in noise on a few
windows.

`allocate` turns the ratio into the read-out's offsets a and slope s. With u = log(rise / saved),
standardised over all layers and transmitters, and relative offsets

    r = clip(base - contrast u, -4, 3)

with base 0, but `reluctance` for serotonin, whose steps are coarse, a common shift is sought for
each budget at which the deficits sigmoid(r + shift) save what the budget asks, each probe's saving
scaled to the deficit; a common offset and slope are then fitted to these shifts. Savings of one
layer's transmitters are added although they overlap, so the dial is a start, not a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.calibration.cache import keep, measurement_key, recall
from vesicle.cost import price_dense
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import FloatArray
from vesicle.predictors import ConstantLevels, Predictor
from vesicle.reference.attach import attach


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One transmitter at one lowered level.

    Attributes:
        name: As reports name it.
        transmitter: Which is lowered.
        level: To where.
        below: For a step of a ladder, the level under which it sets in; None where the effect is
            proportional to the deficit.
    """

    name: str
    transmitter: str
    level: float
    below: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Results of all probes; a probe with no effect (the last layer's GABA, say) has saved 0.

    Attributes:
        probes: P of them.
        rise: (P, L) nats per token.
        saved: (P, L) shares of the dense FLOPs.
    """

    probes: tuple[Probe, ...]
    rise: FloatArray
    saved: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON writes them, `rise` and `saved` as P lists of L numbers."""
        return {
            "probes": [asdict(p) for p in self.probes],
            "rise": self.rise.tolist(),
            "saved": self.saved.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sensitivity:
        """Read what `to_dict` wrote."""
        return cls(
            probes=tuple(Probe(**p) for p in values["probes"]),
            rise=np.array(values["rise"], np.float64),
            saved=np.array(values["saved"], np.float64),
        )


def default_probes(modulator: Modulator) -> tuple[Probe, ...]:
    """Dopamine 0.5, serotonin on each of its two steps, GABA 0.25; those that are released."""
    steps = modulator.serotonin
    probes = (
        Probe(name="dopamine", transmitter="dopamine", level=0.5),
        Probe(
            name="serotonin-ffn",
            transmitter="serotonin",
            level=(steps.ffn_below + steps.attention_below) / 2,
            below=steps.ffn_below,
        ),
        Probe(
            name="serotonin-attention",
            transmitter="serotonin",
            level=(steps.attention_below + steps.bypass_below) / 2,
            below=steps.attention_below,
        ),
        Probe(name="gaba", transmitter="gaba", level=0.25),
    )
    released = modulator.predictor.config.transmitters
    return tuple(p for p in probes if p.transmitter in released)


def measure_sensitivity(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    cache: Path | None = None,
) -> Sensitivity:
    """Probe every layer; takes (1 + P L) forward passes over the windows.

    Args:
        model: A Hugging Face causal LM.
        modulator: Its effectors and stand-ins are used, its predictor is not.
        windows: (N, T) token ids; two windows of 512 do.
        cache: Folder that keeps the result.

    Returns:
        Rises and savings.
    """
    probes, config = default_probes(modulator), modulator.predictor.config
    key = measurement_key(
        model,
        windows,
        [*modulator.ffn_standin.parameters(), *modulator.attention_standin.parameters()],
        {
            "probes": [asdict(p) for p in probes],
            "effectors": {n: e.to_dict() for n, e in modulator.effectors.items()},
            "transmitters": config.transmitters,
        },
    )
    path = cache / "sensitivity.json" if cache else None
    kept = recall(path, key)
    if kept is not None:
        return Sensitivity.from_dict(kept)
    device = next(model.parameters()).device
    rise, saved = np.zeros((2, len(probes), config.n_layers))
    with torch.no_grad():
        for window in windows:
            tokens = window[None].to(device)
            dense = _log_chances(model, tokens)
            for p, probe in enumerate(probes):
                for layer in range(config.n_layers):
                    table = np.ones((config.n_layers, len(config.transmitters)))
                    table[layer, config.transmitters.index(probe.transmitter)] = probe.level
                    lowered = modulator.with_levels(ConstantLevels(config, table))
                    # A constant ignores the dial; any below 1 keeps the method from resting.
                    with attach(model, ModulatorMethod(lowered, 0.5)) as run:
                        probed = _log_chances(model, tokens)
                    whole = price_dense(run.shape, tokens.shape[1]).flops_total
                    gain = 1 - run.cost.flops_total / whole
                    kl = float((dense.exp() * (dense - probed)).sum(-1).mean())
                    rise[p, layer] += max(kl, 0.0) / len(windows)
                    saved[p, layer] += gain / len(windows)
    result = Sensitivity(probes=probes, rise=rise, saved=saved)
    keep(path, key, result.to_dict())
    return result


def allocate(
    sensitivity: Sensitivity,
    predictor: Predictor,
    budgets: Sequence[float] = (0.6, 0.75, 0.9),
    *,
    contrast: float = 1.0,
    reluctance: float = -2.0,
) -> None:
    """Set a predictor's offsets and slopes to a static allocation; see the module docstring.

    Args:
        sensitivity: As measured.
        predictor: Changed in place: `offset` and `log_slope`.
        budgets: Shares of the dense FLOPs for which the dial should be about right.
        contrast: How much more a layer that loses little is lowered than others.
        reluctance: Serotonin's base offset.

    Raises:
        ValueError: If there are fewer than two budgets, or one is out of range.
    """
    if len(set(budgets)) < 2 or not all(0 < b < 1 for b in budgets):
        raise ValueError(f"budgets are {tuple(budgets)}; give two or more between 0 and 1")
    names = predictor.config.transmitters
    relative = np.zeros((predictor.config.n_layers, len(names)))
    useful = sensitivity.saved > 1e-6
    ratio = np.log(np.maximum(sensitivity.rise, 1e-9) / np.where(useful, sensitivity.saved, 1.0))
    if useful.any():
        spread = max(float(ratio[useful].std()), 1e-6)
        ratio = np.where(useful, (ratio - ratio[useful].mean()) / spread, 0.0)
    for a, name in enumerate(names):
        rows = [p for p, probe in enumerate(sensitivity.probes) if probe.transmitter == name]
        # Of serotonin's two steps the cheaper one speaks for the layer.
        best = np.min([ratio[p] for p in rows], axis=0) if rows else 0.0
        base = reluctance if name == "serotonin" else 0.0
        relative[:, a] = np.clip(base - contrast * best, -4, 3)
    logit = np.array([math.log((1 - b) / b) for b in budgets])
    shifts = np.array([_shift(sensitivity, names, relative, b) for b in budgets])
    slope, offset = np.polyfit(logit, shifts, 1)
    slope = float(np.clip(slope, 0.2, 5.0))
    offset = float((shifts - slope * logit).mean())
    with torch.no_grad():
        predictor.offset.copy_(torch.from_numpy(relative + offset))
        predictor.log_slope.fill_(math.log(slope))


def expected_share(
    sensitivity: Sensitivity, transmitters: Sequence[str], levels: FloatArray
) -> float:
    """Share of the dense FLOPs that constant levels (L, A) would execute, to first order."""
    total = 0.0
    for p, probe in enumerate(sensitivity.probes):
        level = levels[:, transmitters.index(probe.transmitter)]
        if probe.below is None:
            part = (1 - level) / (1 - probe.level)
        else:
            # A lower step's saving includes that of the steps above it.
            deeper = [
                q.below
                for q in sensitivity.probes
                if q.transmitter == probe.transmitter and q.below is not None
            ]
            next_step = max((d for d in deeper if d < probe.below), default=-1.0)
            part = ((level < probe.below) & (level >= next_step)).astype(np.float64)
        total += float((part * sensitivity.saved[p]).sum())
    return 1 - total


def _shift(
    sensitivity: Sensitivity, names: Sequence[str], relative: FloatArray, budget: float
) -> float:
    """The shift of the deficits' logits at which the expected share is the budget, by bisection."""
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        levels = 1 / (1 + np.exp(relative + middle))
        if expected_share(sensitivity, names, levels) > budget:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _log_chances(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)

"""Transmitters as probes: which neurons drive a level, and does it fall without them.

A level at layer l is a function of the residual stream there, so every neuron of the layers before
has a slope: contribution of neuron n = d level / d activation (activation - its mean), summed over
tokens and layers. That is attribution at first order (gradient times input, Shrikumar et al. 2016),
and only a claim. The test: neurons with the largest mean contributions are held at their means in
texts that were not looked at, and the released levels move; as many random neurons of the same
layers are held likewise. Levels are then those that a modulator releases at work.

The first tokens of a text do not count: a few neurons have activations of thousands at the first
one (Sun et al. 2024, "Massive activations in large language models"), and would come first for
every transmitter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.intervals import interval
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.edits import Edit, clamp
from vesicle.neurons.hooks import Hooked
from vesicle.predictors import Predictor
from vesicle.transmitters import index as column_of

SKIP = 8
"""First tokens of a text that do not count."""
_POST, _MID = "mlp.hook_post", "hook_resid_mid"


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What neurons contribute to a transmitter's levels.

    Attributes:
        transmitter: Its name.
        means: (L, F) activations on average.
        drive: (L, F) mean contribution to the level of one layer and token, signed.
        size: (L, F) mean magnitude of the contribution, by which neurons are ranked.
    """

    transmitter: str
    means: Tensor
    drive: Tensor
    size: Tensor

    def top(self, count: int) -> list[tuple[int, int]]:
        """The layer and index of the neurons that contribute most."""
        width = self.size.shape[1]
        best = self.size.flatten().argsort(descending=True)[:count].tolist()
        return [divmod(place, width) for place in best]


def attribute(
    hooked: Hooked,
    transmitter: str,
    texts: Tensor,
    *,
    show: Callable[[int, str], None] | None = None,
) -> Attribution:
    """Attribute a transmitter's levels to neurons, on texts (N, T) read by the dense model.

    Args:
        hooked: A model with a modulator below rest.
        transmitter: One that its predictor releases.
        texts: (N, T) token ids.
        show: Told how many texts are done.

    Raises:
        VesicleError: There is no modulator that reads hidden states, it does not release this, or
            texts are too short.
    """
    method, predictor = _released(hooked, transmitter)
    _check_length(texts)
    place = predictor.config.transmitters.index(transmitter)
    n_layers, width = hooked.shape.n_layers, hooked.shape.ffn_width
    dense = Hooked(hooked.model, check=False)
    posts = [f"blocks.{layer}.{_POST}" for layer in range(n_layers)]
    means = torch.zeros(n_layers, width)
    with torch.no_grad():
        for text in texts:
            seen = dense.run(text[None], read=posts)
            means += torch.stack([seen[name][0, SKIP:].mean(0) for name in posts])
    means /= len(texts)
    drive, size = torch.zeros(n_layers, width), torch.zeros(n_layers, width)
    for number, text in enumerate(texts):
        seen = dense.run(text[None], read=["*." + _POST, "*." + _MID], gradients=True)
        positions = torch.arange(len(text))[None]
        dial, state = torch.tensor([method.dial]), {}  # type: ignore[var-annotated]  # by layer
        total = torch.zeros(())
        for layer in range(n_layers):
            hidden = seen[f"blocks.{layer}.{_MID}"]
            levels = predictor.release(layer, hidden, positions, dial, state)
            total = total + levels[0, SKIP:, place].sum().float()
        # The last layer's own neurons come after its level.
        inner = [seen[name] for name in posts[:-1]]
        slopes = torch.autograd.grad(total, inner, allow_unused=True)
        for layer, (slope, name) in enumerate(zip(slopes, posts, strict=False)):
            if slope is None:
                continue
            own = (slope[0] * (seen[name][0].detach() - means[layer]))[SKIP:]
            drive[layer] += own.mean(0) / n_layers
            size[layer] += own.abs().mean(0) / n_layers
        if show is not None:
            show(number + 1, f"text {number + 1}")
    return Attribution(
        transmitter=transmitter, means=means, drive=drive / len(texts), size=size / len(texts)
    )


@torch.no_grad()
def check_by_lesion(
    hooked: Hooked,
    found: Attribution,
    texts: Tensor,
    *,
    count: int = 50,
    draws: int = 5,
    seed: int = 0,
    show: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Hold the neurons that contribute most at their means, and as many random ones.

    Args:
        hooked: The model with its modulator.
        found: The attribution.
        texts: (N, T) others than it was made from.
        count: Neurons.
        draws: Of random neurons, of the same layers.
        seed: Of those.
        show: Told how many texts are done.

    Returns:
        By how much levels change for `named` and `random` neurons, in magnitude and signed, means
        over tokens and layers with 95 % intervals over texts; the difference; and what the lesion
        does to the cost that is executed.

    Raises:
        VesicleError: There are fewer neurons.
    """
    _released(hooked, found.transmitter)
    _check_length(texts)
    n_layers, width = found.size.shape
    top = (n_layers - 1) * width // 2
    if not 1 <= count <= top:
        raise VesicleError(f"count is {count}; allowed: 1 to {top}")
    rng = np.random.default_rng(seed)
    named = found.top(count)
    sets = [named]
    for _ in range(draws):
        drawn = []
        for layer in sorted({layer for layer, _ in named}):
            taken = {i for one, i in named if one == layer}
            free = [i for i in range(width) if i not in taken]
            many = min(len(taken), len(free))
            drawn += [(layer, int(i)) for i in rng.choice(free, many, replace=False)]
        sets.append(drawn)
    column = column_of(found.transmitter)
    moved = np.zeros((len(sets), len(texts), 2))
    cost = np.zeros((len(sets) + 1, len(texts)))
    for number, text in enumerate(texts):
        base = _levels(hooked, text, [])
        cost[-1, number] = base[1]
        for i, own in enumerate(sets):
            edits = _held(own, found.means, range(SKIP, len(text)))
            levels, spent = _levels(hooked, text, edits)
            change = (levels[..., column] - base[0][..., column])[SKIP:]
            moved[i, number] = np.abs(change).mean(), change.mean()
            cost[i, number] = spent
        if show is not None:
            show(number + 1, f"text {number + 1}")
    chance = moved[1:].mean(0)
    told: dict[str, Any] = {"transmitter": found.transmitter, "neurons": count, "draws": draws}
    for name, values in (
        ("named", moved[0, :, 0]),
        ("random", chance[:, 0]),
        ("named_above_random", moved[0, :, 0] - chance[:, 0]),
        ("named_signed", moved[0, :, 1]),
        ("random_signed", chance[:, 1]),
        ("named_cost", cost[0] / cost[-1] - 1),
        ("random_cost", cost[1:-1].mean(0) / cost[-1] - 1),
    ):
        low, high = interval(values)
        told[name] = {"mean": float(values.mean()), "low": low, "high": high}
    return told


def _held(neurons: list[tuple[int, int]], means: Tensor, tokens: Sequence[int]) -> list[Edit]:
    """Edits that hold neurons at their means, one a layer."""
    edits = []
    for layer in sorted({layer for layer, _ in neurons}):
        own = [i for one, i in neurons if one == layer]
        edits.append(clamp(f"blocks.{layer}.{_POST}", own, means[layer, own], tokens))
    return edits


def _levels(hooked: Hooked, text: Tensor, edits: list[Edit]) -> tuple[np.ndarray, float]:
    """Levels (T, L, 5) that are released for a text, and the FLOPs that were executed."""
    run = hooked.run(text[None], edits=edits).run
    assert run is not None
    return run.levels[0], float(run.cost.flops_total)


def _check_length(texts: Tensor) -> None:
    """Refuse texts that are too short to count.

    Raises:
        VesicleError: With what is allowed.
    """
    if texts.shape[1] <= SKIP:
        raise VesicleError(f"texts have {texts.shape[1]} tokens; allowed: {SKIP + 1} and more")


def _released(hooked: Hooked, transmitter: str) -> tuple[ModulatorMethod, Predictor]:
    """The modulator's method and predictor.

    Raises:
        VesicleError: There is none, it rests, or it does not release the transmitter.
    """
    method = hooked.method
    if not isinstance(method, ModulatorMethod) or not isinstance(
        method.modulator.predictor, Predictor
    ):
        raise VesicleError("there is no modulator that reads hidden states: give one")
    if method.at_rest:
        raise VesicleError("the modulator rests, and its levels follow from nothing: lower budget")
    released = method.modulator.predictor.config.transmitters
    if transmitter not in released:
        raise VesicleError(f"transmitter is {transmitter!r}; allowed: {', '.join(released)}")
    return method, method.modulator.predictor

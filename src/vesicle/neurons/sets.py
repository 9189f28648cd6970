"""Sets of neurons: silenced together, drawn at random, and how far two of them overlap.

A neuron is written as one number, `layer * F + index` with F neurons a layer. A set of the same
layers and counts that is drawn at random is what every chosen set is compared with: what it does is
what silencing as many neurons there does, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.neurons.edits import Edit, lesion
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two sets share.

    Attributes:
        shared: Neurons in both.
        chance: Neurons that would be in both if one of them were drawn at random within its layers.
    """

    shared: int
    chance: float


def lesions(numbers: Sequence[int] | Tensor, shape: ModelShape) -> list[Edit]:
    """Edits that silence neurons, one a layer.

    Args:
        numbers: Of the neurons.
        shape: Of the model.

    Raises:
        VesicleError: A number is out of range.
    """
    by_layer: dict[int, list[int]] = {}
    for number in _checked(numbers, shape).tolist():
        layer, index = divmod(number, shape.ffn_width)
        by_layer.setdefault(layer, []).append(index)
    return [
        lesion(f"blocks.{layer}.mlp.hook_post", tuple(indices))
        for layer, indices in sorted(by_layer.items())
    ]


def layer_counts(numbers: Sequence[int] | Tensor, shape: ModelShape) -> Tensor:
    """(L,) how many of the neurons each layer has."""
    layers = _checked(numbers, shape) // shape.ffn_width
    return layers.bincount(minlength=shape.n_layers)


def matched(numbers: Sequence[int] | Tensor, shape: ModelShape, rng: np.random.Generator) -> Tensor:
    """Neurons drawn at random: as many of each layer, and none of those given.

    Args:
        numbers: (k,) neurons.
        shape: Of the model.
        rng: Draws.

    Returns:
        (k,) other neurons.

    Raises:
        VesicleError: More than half of a layer is given, so that too few are left.
    """
    given = _checked(numbers, shape)
    drawn = []
    for layer, count in enumerate(layer_counts(given, shape).tolist()):
        start = layer * shape.ffn_width
        free = np.setdiff1d(np.arange(start, start + shape.ffn_width), given.numpy())
        if count > len(free):
            raise VesicleError(
                f"{count} of layer {layer}'s {shape.ffn_width} neurons are chosen, and too few are "
                "left to compare with; allowed: up to half of a layer"
            )
        drawn.append(rng.choice(free, count, replace=False))
    return torch.from_numpy(np.concatenate(drawn)).long()


def overlap(
    left: Sequence[int] | Tensor, right: Sequence[int] | Tensor, shape: ModelShape
) -> Overlap:
    """What two sets share, beside chance: the sum over layers of |A_l| |B_l| / F."""
    a, b = _checked(left, shape), _checked(right, shape)
    both = torch.isin(a, b).sum()
    by_chance = (layer_counts(a, shape) * layer_counts(b, shape)).sum() / shape.ffn_width
    return Overlap(shared=int(both), chance=float(by_chance))


def _checked(numbers: Sequence[int] | Tensor, shape: ModelShape) -> Tensor:
    found = torch.as_tensor(numbers, dtype=torch.long)
    total = shape.n_layers * shape.ffn_width
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < total:
        bad = next(n for n in found.tolist() if not 0 <= n < total)
        raise VesicleError(f"there is no neuron number {bad}; allowed: 0 to {total - 1}")
    return found

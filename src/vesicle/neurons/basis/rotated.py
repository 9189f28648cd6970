"""Controls of the Local Interaction Basis that have its features' number and lack its alignment.

- `scaled_components`: principal components, each scaled and ranked by its importance for the next
  layer. What it lacks is the rotation: the alignment with the Jacobian.
- `random_rotation`: the very directions that the basis kept, whitened, turned at random, and scaled
  and ranked by importance again. What it lacks is any alignment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.neurons.basis.coordinates import Basis


def scaled_components(components: Basis, metric: Tensor) -> Basis:
    """Principal components scaled by importance.

    Args:
        components: Of the layer.
        metric: (D, D) as `local_interaction` takes it.
    """
    per_unit = (components.encode @ metric.double() * components.encode).sum(-1).clamp_min(0)
    importance = per_unit * components.importance
    order = importance.argsort(descending=True, stable=True)
    order = order[importance[order] > 0]
    scale = per_unit[order].sqrt()
    return Basis(
        mean=components.mean,
        encode=components.encode[order] * scale[:, None],
        decode=components.decode[:, order] / scale,
        importance=importance[order],
    )


def random_rotation(basis: Basis, generator: torch.Generator) -> Basis:
    """A basis of the same space whose axes are drawn at random, evenly over all rotations.

    Args:
        basis: Whose features are uncorrelated.
        generator: Of the rotation.
    """
    k, deviation = basis.n_features, basis.importance.sqrt()
    drawn, upper = torch.linalg.qr(
        torch.randn(k, k, generator=generator, dtype=torch.float64).to(basis.encode)
    )
    turn = drawn * upper.diagonal().sign()  # without it, QR's own signs would make them uneven
    importance = (turn.square() @ basis.importance).sort(descending=True)
    turn = turn[importance.indices]
    scale = importance.values.sqrt()
    return Basis(
        mean=basis.mean,
        encode=scale[:, None] * (turn / deviation) @ basis.encode,
        decode=(basis.decode * deviation) @ turn.mT / scale,
        importance=importance.values,
    )

"""The Local Interaction Basis (Bushnaq et al. 2024), from the last layer back to the first.

In the last layer it is that of principal components. Below it, with mean m and covariance
C = U diag(d) Uᵀ of a layer's activations x, with E the matrix that encodes the layer after it and
J(x) the Jacobian of what lies between the two:

    w  = diag(d)^-1/2 Uᵀ (x - m)                     whitened; directions with d near 0 are dropped
    M  = mean over x of (E J U diag(d)^1/2)ᵀ (E J U diag(d)^1/2)  =  V diag(λ) Vᵀ
    f  = diag(λ)^1/2 Vᵀ w                            features; directions with λ near 0 are dropped

V holds the right singular vectors of all the Jacobians stacked on each other. So the features have
covariance diag(λ), and the mean of squared Jacobians, seen from them, is the identity: λ says how
far a feature moves the next layer's features, to first order, and is its importance.

Where activations belong to positions that attend to each other, J reaches from each position to all
later ones, and M is estimated by random cotangents: for independent normal numbers z over the next
layer's features at all positions, zᵀ E J has covariance (E J)ᵀ (E J).

Not reproduced from the paper: biases as features of their own (the mean plays their part), and a
direction set apart for what layer norm divides by. The authors cut eigenvalues at an absolute
1e-15; here it is at a share of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vesicle.neurons.basis.coordinates import Basis, Moments, moments
from vesicle.neurons.basis.pca import TOLERANCE, descending, principal_components

Section = Callable[[Tensor], Tensor]
"""What lies between two layers: activations (..., D) to those of the next layer, differentiable."""


def local_interaction(known: Moments, metric: Tensor, tolerance: float = TOLERANCE) -> Basis:
    """The basis of one layer, in float64.

    Args:
        known: Mean and covariance of its activations.
        metric: (D, D) mean of (E J)ᵀ (E J), from `squared_jacobian` or `sampled_jacobian`.
        tolerance: Directions with less than this share of the largest variance, or importance,
            are dropped.

    Raises:
        ValueError: The activations do not vary, or nothing in them has an effect.
    """
    whole = principal_components(known, tolerance)
    deviation = whole.importance.sqrt()
    towards = whole.decode * deviation  # (D, n) from whitened coordinates to activations
    importance, rotation = descending(towards.mT @ metric.double() @ towards)
    if importance[0] <= 0:
        raise ValueError("the next layer does not depend on this one; allowed: layers that matter")
    kept = importance > tolerance * importance[0]
    importance, rotation = importance[kept], rotation[:, kept]
    scale = importance.sqrt()
    return Basis(
        mean=known.mean,
        encode=(scale * rotation).mT @ (whole.encode / deviation[:, None]),
        decode=towards @ (rotation / scale),
        importance=importance,
    )


def local_interaction_bases(
    sections: Sequence[Section], inputs: Tensor, tolerance: float = TOLERANCE
) -> list[Basis]:
    """The bases of all layers of a network without positions.

    Args:
        sections: What lies between adjacent layers, first to last.
        inputs: (N, D) activations of the first layer.
        tolerance: As for `local_interaction`.

    Returns:
        A basis a layer, one more than sections.
    """
    layers = activations(sections, inputs)
    bases = [principal_components(moments(layers[-1]), tolerance)]
    for section, x in zip(reversed(sections), reversed(layers[:-1]), strict=True):
        metric = squared_jacobian(section, x, bases[0])
        bases.insert(0, local_interaction(moments(x), metric, tolerance))
    return bases


@torch.no_grad()
def activations(sections: Sequence[Section], inputs: Tensor) -> list[Tensor]:
    """(N, D) of each layer, one more than sections, from those of the first."""
    found = [inputs]
    for section in sections:
        found.append(section(found[-1]))
    return found


def squared_jacobian(section: Section, x: Tensor, target: Basis) -> Tensor:
    """(D, D) mean over points of (E J)ᵀ (E J), exactly.

    Args:
        section: From these activations to the target's; each point is by itself.
        x: (N, D).
        target: Basis of the next layer, with E its matrix `encode`.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = section(leaf)
        total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
        for row in target.encode.to(out.dtype):
            (slope,) = torch.autograd.grad(out, leaf, row.expand_as(out), retain_graph=True)
            total += (slope.mT @ slope).double()
    return total / len(x)


def sampled_jacobian(
    section: Section,
    x: Tensor,
    target: Basis,
    *,
    probes: int,
    generator: torch.Generator,
    skipped: int = 0,
) -> Tensor:
    """(D, D) mean over positions of (E J)ᵀ (E J), from positions to all those that they reach.

    Args:
        section: From these activations to the target's; positions may attend to each other.
        x: (B, T, D).
        target: Basis of the next layer, with E its matrix `encode`.
        probes: Random cotangents; the error falls as the root of probes times positions.
        generator: Of those.
        skipped: First positions that are held fixed, and are not looked at in the next layer.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = section(leaf)
        encode = target.encode.to(out.dtype)
        total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
        for _ in range(probes):
            drawn = torch.randn(*out.shape[:-1], len(encode), generator=generator, dtype=out.dtype)
            drawn[:, :skipped] = 0
            (slope,) = torch.autograd.grad(out, leaf, drawn @ encode, retain_graph=True)
            flat = slope[:, skipped:].flatten(0, -2)
            total += (flat.mT @ flat).double()
    return total / (probes * x[:, skipped:, 0].numel())

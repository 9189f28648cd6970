"""Edges of the interaction graph: how much a feature gives to each feature of the next layer.

Attributions are integrated gradients along the straight path from the mean activation m to x, with
g from features to features of the next layer, and f_j and g_i one of each:

    A_ij(x) = f_j(x) ∫₀¹ ∂g_i / ∂f_j (m + α (x - m)) dα          E_ij = mean over x of A_ij(x)²

Over j they sum to g_i(x) - g_i(m), but for what the dropped directions give, which is a sum of its
own. A scale of f_j changes no attribution, a scale of g_i all of its row.

Where positions attend to each other, A_ij(x) at a position is what feature j of all positions up to
it gives together, and the mean is over positions. For a feature j this is one directional
derivative, which forward-mode differentiation finds for all i and all positions at once; so the
sums are exact, and no random cotangents are needed as in the paper.

The integral is the mean over the midpoints of equal parts of the path. The configurations that the
authors published take the gradient at x alone; here one part takes it half-way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import jvp, vmap

from vesicle.neurons.basis.coordinates import Basis
from vesicle.neurons.basis.local_interaction import Section

_AT_ONCE = 32


def edges(
    section: Section,
    x: Tensor,
    source: Basis,
    target: Basis,
    *,
    parts: int = 1,
    skipped: int = 0,
    at_once: int = _AT_ONCE,
) -> Tensor:
    """(k_target, k_source) mean squared attributions.

    Args:
        section: From activations of the source to those of the target.
        x: (N, D) points, or (B, T, D) positions.
        source: Basis of these activations.
        target: Basis of the next layer.
        parts: Of the path.
        skipped: First positions that are held fixed, and are not looked at in the next layer.
        at_once: Features of the source whose derivatives are taken together.
    """
    found = [
        _mean_square(given)
        for _, given in _in_turn(section, x, source, target, parts, skipped, at_once)
    ]
    return torch.cat(found).mT


def residual_edges(
    section: Section,
    x: Tensor,
    source: Basis,
    target: Basis,
    *,
    parts: int = 1,
    skipped: int = 0,
    at_once: int = _AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Edges of a layer that adds to its input, and of what it adds alone, (k_target, k_source).

    The input passes on by itself. What that gives, f_j(x) times the product of i's row of `encode`
    in the target and j's column of `decode` in the source, is taken from each attribution before it
    is squared.

    Args:
        section: As for `edges`, and so are the others.
        x: (N, D) or (B, T, D).
        source: Basis of these activations.
        target: Basis of the next layer, whose activations have as many dimensions.
        parts: Of the path.
        skipped: First positions left out.
        at_once: Features of the source at once.
    """
    whole, added = [], []
    passed = (target.encode @ source.decode).mT.to(x.dtype)  # (k_source, k_target)
    features = source.to(x.dtype).features(x)
    if skipped:
        features = features[..., skipped:, :]
    for columns, given in _in_turn(section, x, source, target, parts, skipped, at_once):
        whole.append(_mean_square(given))
        through = torch.stack([features[..., j, None] * passed[j] for j in columns])
        added.append(_mean_square(given - through))
    return torch.cat(whole).mT, torch.cat(added).mT


def _in_turn(
    section: Section,
    x: Tensor,
    source: Basis,
    target: Basis,
    parts: int,
    skipped: int,
    at_once: int,
) -> Iterator[tuple[range, Tensor]]:
    """Attributions of all features of the source, some at a time."""
    for first in range(0, source.n_features, at_once):
        columns = range(first, min(first + at_once, source.n_features))
        yield (
            columns,
            attributions(section, x, source, target, columns=columns, parts=parts, skipped=skipped),
        )


def _mean_square(given: Tensor) -> Tensor:
    """(c, k_target) of attributions (c, ..., k_target)."""
    return given.flatten(1, -2).square().mean(1)


@torch.no_grad()
def attributions(
    section: Section,
    x: Tensor,
    source: Basis,
    target: Basis,
    *,
    columns: range | None = None,
    parts: int = 1,
    skipped: int = 0,
) -> Tensor:
    """(c, ..., k_target) what features of the source give to those of the target, signed.

    Args:
        section: As for `edges`, and so are the others.
        x: (N, D) or (B, T, D).
        source: Basis of these activations.
        target: Basis of the next layer.
        columns: The c features; all, and after them what the dropped directions give together, if
            not given.
        parts: Of the path.
        skipped: First positions left out; the result has T - skipped positions.
    """
    source, target = source.to(x.dtype), target.to(x.dtype)
    features = source.features(x)
    chosen = range(source.n_features) if columns is None else columns
    steps = [features[..., j, None] * source.decode[:, j] for j in chosen]
    if columns is None:
        steps.append(x - source.restored(features))
    directions = torch.stack(steps)
    away = x - source.mean
    if skipped:
        directions[..., :skipped, :] = 0
        away[..., :skipped, :] = 0
    total = x.new_zeros(())
    for part in range(parts):
        place = x - away * (1 - (part + 0.5) / parts)

        def along(direction: Tensor, place: Tensor = place) -> Tensor:
            moved: Tensor = jvp(section, (place,), (direction,))[1]
            return moved

        total = total + vmap(along)(directions) @ target.encode.mT
    whole = total / parts
    return whole[..., skipped:, :] if skipped else whole

"""Two checkpoints of one model: which neurons change their class (Zhang et al. 2025).

Published of alignment: fewer specific neurons, more related and more general ones, and most keep
their class. Beside the change stands what other sentences do to the same model: its neurons as one
half of the sentences has them, and as the other half has them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.neurons.claims import Claim, verdict
from vesicle.neurons.languages.entropy import (
    GENERAL,
    KINDS,
    RELATED,
    SPECIFIC,
    Classes,
    classify,
    probabilities,
)
from vesicle.neurons.languages.parts import by_layer
from vesicle.neurons.languages.resampled import resample
from vesicle.shapes import ModelShape

_CLAIMS = (
    ("fewer specific", "alignment leaves fewer specific neurons", SPECIFIC, -1),
    ("more related", "alignment makes more related neurons", RELATED, 1),
    ("more general", "alignment makes more general neurons", GENERAL, 1),
)


def compare(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    shape: ModelShape,
    share: float,
    draws: int,
) -> dict[str, Any]:
    """What becomes of neurons' classes.

    Args:
        before: Counts (C, K, M) and tokens (C, K) of chunks of sentences, of one checkpoint.
        after: The same of the other.
        shape: Of both.
        share: Of neurons that are selected.
        draws: Of chunks, for intervals.

    Returns:
        `numbers` before and after by class; `moved` (4, 4) from class to class; `by_count` before
        and after, by how many languages share a neuron; `kept` the share of language neurons that
        stay ones, beside `kept_by_halves`; `layers` changes by layer; `claims`.
    """
    chunks = torch.arange(len(before[1]))
    left, right = of_chunks(before, chunks, share), of_chunks(after, chunks, share)
    halves = [of_chunks(before, half, share) for half in (chunks[::2], chunks[1::2])]
    by_halves = _numbers(halves[1]) - _numbers(halves[0])

    def change(drawn: Tensor) -> NDArray[np.float64]:
        found = _numbers(of_chunks(after, drawn, share)) - _numbers(of_chunks(before, drawn, share))
        return np.array([sign * found[kind] for _, _, kind, sign in _CLAIMS], dtype=float)

    estimates = resample(change, len(chunks), draws)
    layers = [by_layer(classes, shape) for classes in (left, right)]
    return {
        "numbers": {
            kind: [int(_numbers(one)[i]) for one in (left, right)] for i, kind in enumerate(KINDS)
        },
        "moved": [
            [int(((left.kind == i) & (right.kind == j)).sum()) for j in range(len(KINDS))]
            for i in range(len(KINDS))
        ],
        "by_count": [_by_count(one) for one in (left, right)],
        "kept": _kept(left, right),
        "kept_by_halves": _kept(*halves),
        "layers": {
            name: [b - a for a, b in zip(row, layers[1][name], strict=True)]
            for name, row in layers[0].items()
        },
        "claims": [
            asdict(
                Claim(
                    name=name,
                    published=published,
                    measured="neurons, after less before" if sign > 0 else "before less after",
                    found=found,
                    control=f"the same model by two halves of the sentences: {by_halves[kind]:+d}",
                    verdict=verdict(found),
                )
            )
            for (name, published, kind, sign), found in zip(_CLAIMS, estimates, strict=True)
        ],
    }


def of_chunks(counted: tuple[Tensor, Tensor], chunks: Tensor, share: float) -> Classes:
    """Classes by some chunks of sentences, a chunk as often as it is named.

    Args:
        counted: Counts (C, K, M) and tokens (C, K).
        chunks: Numbers.
        share: Of neurons that are selected.
    """
    counts, tokens = counted
    return classify(probabilities(counts[chunks].sum(0), tokens[chunks].sum(0)), share)


def _numbers(classes: Classes) -> Tensor:
    return classes.kind.bincount(minlength=len(KINDS))


def _by_count(classes: Classes) -> list[int]:
    """Classified neurons by how many languages they are of, from 1 to K."""
    n_languages = classes.often.shape[1]
    counts = classes.count[classes.kind > 0]
    return counts.bincount(minlength=n_languages + 1)[1:].tolist()


def _kept(left: Classes, right: Classes) -> float:
    """Share of the first's language neurons that are the second's, too."""
    a, b = left.of_languages(), right.of_languages()
    return float((a & b).sum() / a.sum().clamp_min(1))

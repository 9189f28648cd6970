"""What activation probabilities say: numbers of neurons by class and layer, parts, and claims.

The control are languages that were mixed: each chunk of sentences gets the languages' labels in
another order, so that what is left of a difference is chance. How stable classes are is told by
two halves of the sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.errors import DataError
from vesicle.neurons.claims import Claim, Estimate, estimate, verdict
from vesicle.neurons.languages.compared import of_chunks
from vesicle.neurons.languages.entropy import KINDS, Classes, classify, lape, probabilities
from vesicle.neurons.languages.parts import (
    NAMES,
    PUBLISHED,
    by_layer,
    curves,
    differences,
    divide,
    means,
    shuffled,
)
from vesicle.neurons.languages.resampled import resample
from vesicle.neurons.languages.settings import LanguageSettings
from vesicle.shapes import ModelShape

ENGLISH = "eng_Latn"


def describe(
    counted: tuple[Tensor, Tensor],
    languages: Sequence[str],
    shape: ModelShape,
    settings: LanguageSettings,
) -> dict[str, Any]:
    """Describe a model's language neurons.

    Args:
        counted: Counts (C, K, M) and tokens (C, K) of chunks of sentences.
        languages: K names.
        shape: Of the model.
        settings: Of the analysis.

    Returns:
        `languages`, `classes`, `layers`, `parts` and `claims`.

    Raises:
        DataError: The model has too few layers for four parts.
    """
    if shape.n_layers < len(NAMES):
        raise DataError(
            f"the model has {shape.n_layers} layers; allowed: {len(NAMES)} and more, one a part"
        )
    classes = of_chunks(counted, torch.arange(len(counted[1])), settings.share)
    mixed = [
        classify(probabilities(*shuffled(*counted, np.random.default_rng(seed))), settings.share)
        for seed in range(settings.seeds)
    ]
    rows = curves(classes, shape)
    parts = divide(rows)
    of_parts = means(rows, parts.starts)
    claims = [
        *_claims(counted, mixed, parts.starts, shape, settings),
        *_english(classes, languages),
    ]
    specific = [len(classes.of(k, related=False)) for k in range(len(languages))]
    return {
        "languages": [
            {
                "language": name,
                "specific": specific[k],
                "related": len(classes.of(k)) - specific[k],
                "tokens": int(counted[1][:, k].sum()),
            }
            for k, name in enumerate(languages)
        ],
        "classes": {
            **_numbers(classes),
            "balance": classes.balance,
            "bar": classes.bar,
            "mixed": {
                kind: float(np.mean([_numbers(one)[kind] for one in mixed])) for kind in KINDS
            },
            "kept_by_halves": _kept_by_halves(counted, settings),
            **_lape(counted, classes, settings.share),
        },
        "layers": by_layer(classes, shape),
        "parts": {
            **asdict(parts),
            "language": of_parts[0].tolist(),
            "general": of_parts[1].tolist(),
            "mixed_explained": float(
                np.mean([divide(curves(one, shape)).explained for one in mixed])
            ),
        },
        "claims": [asdict(claim) for claim in claims],
    }


def _claims(
    counted: tuple[Tensor, Tensor],
    mixed: Sequence[Classes],
    starts: Sequence[int],
    shape: ModelShape,
    settings: LanguageSettings,
) -> list[Claim]:
    """That there are language neurons, and the differences between parts."""

    def values(drawn: Tensor) -> NDArray[np.float64]:
        own = of_chunks(counted, drawn, settings.share)
        return np.array([own.of_languages().sum(), *differences(curves(own, shape), starts)])

    numbers, *each = resample(values, len(counted[1]), settings.draws)
    chance = float(np.mean([int(one.of_languages().sum()) for one in mixed]))
    by_chance = np.mean([differences(curves(one, shape), starts) for one in mixed], axis=0)
    above = Estimate(
        mean=numbers.mean - chance,
        low=numbers.low - chance,
        high=numbers.high - chance,
        n=numbers.n,
    )
    found = [
        Claim(
            name="language neurons",
            published="some neurons fire often in one language or in several, not in all",
            measured="specific and related neurons, less those of mixed languages",
            found=above,
            control=f"mixed languages: {chance:.0f}",
            verdict=verdict(above),
        )
    ]
    for (words, _, high, low), one, mean in zip(PUBLISHED, each, by_chance, strict=True):
        found.append(
            Claim(
                name=words,
                published=f"{words}: {NAMES[high]} above {NAMES[low]}",
                measured="difference of the shares of a layer's neurons",
                found=one,
                control=f"mixed languages: {mean:+.3f}",
                verdict=verdict(one),
            )
        )
    return found


def _english(classes: Classes, languages: Sequence[str]) -> list[Claim]:
    if ENGLISH not in languages:
        return []
    numbers = {name: len(classes.of(k)) for k, name in enumerate(languages)}
    english = numbers.pop(ENGLISH)
    found = estimate([float(number - english) for number in numbers.values()])
    return [
        Claim(
            name="English",
            published="English has fewer language neurons than other languages",
            measured="language neurons of another language, less those of English",
            found=found,
            control=f"English has {english}",
            verdict=verdict(found),
        )
    ]


def _numbers(classes: Classes) -> dict[str, int]:
    return {kind: int((classes.kind == i).sum()) for i, kind in enumerate(KINDS)}


def _kept_by_halves(counted: tuple[Tensor, Tensor], settings: LanguageSettings) -> float:
    """Share of language neurons by half of the sentences that the other half has, too."""
    found = []
    for seed in range(settings.seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(counted[1])))
        a, b = (
            of_chunks(counted, order[side::2], settings.share).of_languages() for side in (0, 1)
        )
        found.append(float((a & b).sum() / a.sum().clamp_min(1)))
    return float(np.mean(found))


def _lape(counted: tuple[Tensor, Tensor], classes: Classes, share: float) -> dict[str, Any]:
    """How many neurons LAPE selects, and the share of them that are language neurons here."""
    alone = lape(probabilities(counted[0].sum(0), counted[1].sum(0)), share)
    both = (alone & classes.of_languages()).sum()
    return {"lape": int(alone.sum()), "of_lape": float(both / alone.sum().clamp_min(1))}

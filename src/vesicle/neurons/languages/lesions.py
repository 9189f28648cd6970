"""A language's neurons silenced: what becomes of each language's loss.

The published matrix: a row is the language whose neurons are silenced, a column the one that is
read. Beside a language's neurons (specific ones; specific and related ones) stand random neurons of
the same layers and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.neurons.claims import Claim, estimate, told, verdict
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.languages.entropy import Classes
from vesicle.neurons.sets import lesions, matched

SPECIFIC_SET, LANGUAGE_SET, RANDOM_SET = "specific", "language", "random"
Sentences = Sequence[Sequence[int]]


@torch.no_grad()
def losses(hooked: Hooked, sentences: Sentences, silenced: Sequence[int] | Tensor = ()) -> Tensor:
    """(S,) nats a token of each sentence.

    Args:
        hooked: The model.
        sentences: Token ids, two and more of each.
        silenced: Numbers of neurons.
    """
    model: Any = hooked.model
    found = []
    with hooked.hold(lesions(silenced, hooked.shape)):
        for ids in sentences:
            row = torch.tensor([ids])
            logits = model(row, use_cache=False).logits[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits, row[0, 1:]))
    return torch.stack(found)


def language_lesions(
    hooked: Hooked,
    judged: Sequence[Sentences],
    classes: Classes,
    language: int,
    seeds: int,
) -> dict[str, Any]:
    """Silence one language's neurons, and read all languages.

    Args:
        hooked: The model.
        judged: By language that is read, its sentences.
        classes: Of neurons.
        language: Number of the language, in `classes`.
        seeds: Draws of random neurons.

    Returns:
        `neurons`: how many are specific, and in all; `losses`: by set, rows of sentences by
        language that is read, of random ones the mean over draws.
    """
    own, specific = classes.of(language), classes.of(language, related=False)
    sets = [(SPECIFIC_SET, specific), (LANGUAGE_SET, own)]
    for seed in range(seeds):
        rng = np.random.default_rng([language, seed])
        sets.append((RANDOM_SET, matched(own, hooked.shape, rng)))
    found: dict[str, list[list[list[float]]]] = {}
    for name, neurons in sets:
        rows = [losses(hooked, sentences, neurons).tolist() for sentences in judged]
        found.setdefault(name, []).append(rows)
    return {
        "neurons": {SPECIFIC_SET: len(specific), LANGUAGE_SET: len(own)},
        "losses": {name: np.mean(rows, axis=0).tolist() for name, rows in found.items()},
    }


def matrix(parts: Sequence[dict[str, Any]], before: Sequence[Sequence[float]], kind: str) -> Any:
    """(K, K) mean rise of the loss in nats: a row a lesion, a column a language that is read.

    Args:
        parts: By language, what `language_lesions` gave.
        before: By language, losses of its sentences with nothing silenced.
        kind: Of the set.
    """
    base = np.array(before).mean(-1)
    return np.array([np.mean(part["losses"][kind], axis=-1) - base for part in parts])


def lesion_claims(
    parts: Sequence[dict[str, Any]], before: Sequence[Sequence[float]]
) -> list[Claim]:
    """What was published of lesions; intervals are over languages.

    Args:
        parts: By language, what `language_lesions` gave, in the order in which they are read.
        before: By language, losses of its sentences with nothing silenced.
    """
    rise = {kind: matrix(parts, before, kind) for kind in (SPECIFIC_SET, LANGUAGE_SET, RANDOM_SET)}
    own = {kind: np.diagonal(rows) for kind, rows in rise.items()}
    n = len(parts)
    others = (rise[LANGUAGE_SET].sum(1) - own[LANGUAGE_SET]) / max(1, n - 1)
    random = estimate(own[RANDOM_SET])
    rows = (
        (
            "own neurons",
            "a language is harmed by the loss of its neurons",
            "nats more in the language whose neurons are silenced, less those by random neurons",
            own[LANGUAGE_SET] - own[RANDOM_SET],
            f"random neurons: {told(random)}",
        ),
        (
            "own language",
            "other languages are hardly harmed",
            "nats more in the language whose neurons are silenced, less those in others",
            own[LANGUAGE_SET] - others,
            f"others: {told(estimate(others))}",
        ),
        (
            "related neurons",
            "related neurons matter beside specific ones",
            "nats more without specific and related neurons, less those without specific ones",
            own[LANGUAGE_SET] - own[SPECIFIC_SET],
            f"without specific ones: {told(estimate(own[SPECIFIC_SET]))}",
        ),
    )
    return [
        Claim(
            name=name,
            published=published,
            measured=measured,
            found=(found := estimate(values)),
            control=control,
            verdict=verdict(found),
        )
        for name, published, measured, values, control in rows
    ]

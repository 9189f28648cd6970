"""One relation's neurons silenced, beside random ones: what the model still answers.

At the chosen number of neurons, facts of all relations are asked; at other numbers the relation's
own known facts and as many of others. Where there is a second wording, its own facts are asked in
it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.knowledge import Asked, Split
from vesicle.neurons.relations.questions import Encode, judge
from vesicle.neurons.sets import matched

RELATION, RANDOM, NONE = "relation", "random", "none"
Place = tuple[int, int]
"""A fact: the number of its relation, and its own."""


@dataclass(frozen=True, kw_only=True)
class Lesioned:
    """What a model answered while neurons were silenced.

    Attributes:
        kind: `relation`, `random` neurons of the same layers and counts, or `none`.
        times: The number of neurons, as a multiple of the chosen one.
        wording: 0 for the first, 1 for the second.
        places: Facts asked.
        correct: Whether each answer was said.
        nats: Log probability of each answer.
    """

    kind: str
    times: float
    wording: int
    places: tuple[Place, ...]
    correct: tuple[bool, ...]
    nats: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Lesioned:
        """What `to_dict` wrote."""
        found = cls(**{name: _tuples(value) for name, value in values.items()})
        return replace(found, places=tuple((r, i) for r, i in found.places))


def lesion_relation(
    hooked: Hooked,
    encode: Encode,
    asked: Sequence[Asked],
    split: Split,
    number: int,
    ranked: Tensor,
    count: int,
    times: Sequence[float],
    rng: np.random.Generator,
) -> list[Lesioned]:
    """Silence more and more of a relation's neurons, and random ones.

    Args:
        hooked: The model.
        encode: Text to token ids.
        asked: All relations.
        split: Whose facts judge.
        number: Of the relation.
        ranked: Its neurons, the most specific first, `max(times) * count` or more.
        count: Neurons at 1.
        times: Multiples of it, 1 among them.
        rng: Draws random neurons and others' facts.

    Returns:
        Of each multiple the relation's and the random ones; then the second wording's.
    """
    own = [place for place in split.judged_by if place[0] == number]
    others = [place for place in split.judged_by if place[0] != number]
    some = rng.choice(len(others), min(len(own), len(others)), replace=False)
    few = [*own, *(others[i] for i in sorted(some.tolist()))]

    def asked_under(
        kind: str, factor: float, wording: int, places: Sequence[Place], silenced: Sequence[int]
    ) -> Lesioned:
        # All known and unknown facts were asked in the first wording: none is dropped here.
        there = [
            (place, q)
            for place in places
            if (q := asked[place[0]].question(place[1], encode, wording)) is not None
        ]
        found = judge(hooked, [q for _, q in there], silenced)
        return Lesioned(
            kind=kind,
            times=factor,
            wording=wording,
            places=tuple(place for place, _ in there),
            correct=tuple(found.correct.tolist()),
            nats=tuple(found.nats.tolist()),
        )

    found = []
    second = len(asked[number].wordings) > 1
    for factor in times:
        chosen = ranked[: max(1, round(factor * count))]
        drawn = matched(chosen, hooked.shape, rng)
        every = factor == 1.0
        places = [*split.judged_by, *split.unknown] if every else few
        for kind, silenced in ((RELATION, chosen), (RANDOM, drawn)):
            found.append(asked_under(kind, factor, 0, places, silenced.tolist()))
            if every and second:
                found.append(asked_under(kind, factor, 1, own, silenced.tolist()))
    if second:
        found.append(asked_under(NONE, 0.0, 1, own, []))
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

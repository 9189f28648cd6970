"""What a model answered under lesions, fact by fact, beside what it answered before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vesicle.neurons.relations.knowledge import Asked
from vesicle.neurons.relations.lesioned import Lesioned, Place

Run = dict[tuple[int, int], list[Lesioned]]
"""What was answered, by seed and number of the relation whose neurons were silenced."""
Values = dict[Place, float]
"""A number for each fact, a mean over seeds."""


class Answers:
    """Changes of what a model answers, by what was silenced."""

    def __init__(self, asked: Sequence[Asked], run: Run) -> None:
        """Of relations, what they answered before and under lesions."""
        self.asked, self.run = asked, run
        self.seeds = sorted({seed for seed, _ in run})
        self.numbers = range(len(asked))

    def known(self, place: Place) -> bool:
        """Whether the model knows a fact."""
        return self.asked[place[0]].correct[place[1]]

    def changes(self, number: int, kind: str, times: float, what: str) -> Values:
        """Of each fact the mean change of `correct` or `nats` under a relation's lesion."""
        after = self.after(number, kind, times, what, 0)
        return {(r, i): x - float(getattr(self.asked[r], what)[i]) for (r, i), x in after.items()}

    def after(self, number: int, kind: str, times: float, what: str, wording: int) -> Values:
        """The same in a wording, not the change but what it is then."""
        found: dict[Place, list[float]] = {}
        for seed in self.seeds:
            for row in self.run[seed, number]:
                if (row.kind, row.times, row.wording) == (kind, times, wording):
                    for place, value in zip(row.places, getattr(row, what), strict=True):
                        found.setdefault(place, []).append(float(value))
        return {place: float(np.mean(own)) for place, own in found.items()}

    def lost(self, number: int, kind: str, times: float, *, own: bool = True) -> float:
        """Share of known facts lost: the relation's own, or all others'."""
        values = self.changes(number, kind, times, "correct")
        return -float(np.mean([v for p, v in values.items() if self._is(p, number, own)]))

    def each_lost(self, kind: str, times: float, *, own: bool = True) -> np.ndarray:
        """(R,) the same of all relations."""
        return np.array([self.lost(number, kind, times, own=own) for number in self.numbers])

    def _is(self, place: Place, number: int, own: bool) -> bool:
        return self.known(place) and (place[0] == number) == own

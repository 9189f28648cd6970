"""What lesions of relation neurons do, beside random neurons of the same layers and counts.

By size of the lesion (`Dose`), by relation (`OfOne`), and by pair of relations (`Pair`), judged by
facts that the model knows and, for pairs, by as many that it does not. A fact's changes are
averaged over seeds; intervals are over relations where all of them are meant, over facts within
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from torch import Tensor

from vesicle.neurons.claims import Estimate, estimate
from vesicle.neurons.relations.answers import Answers, Values
from vesicle.neurons.relations.lesioned import NONE, RANDOM, RELATION, Place
from vesicle.neurons.sets import overlap
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Dose:
    """Lesions of one size, all relations together; shares of known facts that are lost.

    Attributes:
        times: Multiple of the chosen number of neurons.
        neurons: How many.
        own: Of the relation's own facts.
        random: Of its own facts, by random neurons.
        others: Of other relations' facts.
        above_random: `own` less `random`.
        above_others: `own` less `others`.
        nats: By how much more its own answers' log probability falls than by random neurons.
        shared: Share of its neurons that another relation has too, the mean over pairs.
        chance: The same by chance, within layers.
    """

    times: float
    neurons: int
    own: Estimate
    random: Estimate
    others: Estimate
    above_random: Estimate
    above_others: Estimate
    nats: Estimate
    shared: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class OfOne:
    """One relation's known facts under its own lesion, of the chosen size.

    Attributes:
        relation: Its name.
        wordings: In which it was asked.
        asked: Facts asked.
        known: Of them.
        lost: Share of known facts lost.
        lost_random: The same by random neurons.
        above_random: The difference.
        other_wording: The difference in the second wording, over the facts known in it; None
            without one.
    """

    relation: str
    wordings: tuple[str, ...]
    asked: int
    known: int
    lost: Estimate
    lost_random: Estimate
    above_random: Estimate
    other_wording: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the lesion of one relation's neurons does to another's facts.

    Attributes:
        lesioned: The relation whose neurons are silenced.
        judged: The one whose facts are asked, known and unknown ones.
        change: Of accuracy, less the change by random neurons.
        nats: The same of log probabilities.
        random_change: Of accuracy, by random neurons.
        control: As `change`, where the random neurons of a third relation take the place of the
            relation's: what chance gives.
        shared: Neurons of both relations.
        chance: Those that would be by chance, within layers.
    """

    lesioned: str
    judged: str
    change: Estimate
    nats: Estimate
    random_change: float
    control: Estimate
    shared: float
    chance: float


def dose(
    answers: Answers,
    chosen: dict[tuple[int, int], Tensor],
    shape: ModelShape,
    times: float,
    neurons: int,
) -> Dose:
    """Lesions of one size.

    Args:
        answers: Of the model.
        chosen: By seed and relation its neurons, best first.
        shape: Of the model.
        times: The size.
        neurons: How many that is.
    """
    own, random = answers.each_lost(RELATION, times), answers.each_lost(RANDOM, times)
    others = answers.each_lost(RELATION, times, own=False)
    nats = [
        float(
            np.mean(
                _less(
                    answers.changes(n, RANDOM, times, "nats"),
                    answers.changes(n, RELATION, times, "nats"),
                    lambda place, n=n: place[0] == n and answers.known(place),  # type: ignore[misc]  # the loop's own n
                )
            )
        )
        for n in answers.numbers
    ]
    sets = [
        overlap(chosen[seed, left][:neurons], chosen[seed, right][:neurons], shape)
        for seed in answers.seeds
        for left, right in combinations(answers.numbers, 2)
    ]
    return Dose(
        times=times,
        neurons=neurons,
        own=estimate(own),
        random=estimate(random),
        others=estimate(others),
        above_random=estimate(own - random),
        above_others=estimate(own - others),
        nats=estimate(nats),
        shared=float(np.mean([one.shared for one in sets])) / neurons,
        chance=float(np.mean([one.chance for one in sets])) / neurons,
    )


def of_one(answers: Answers, number: int) -> OfOne:
    """One relation's own facts under its own lesion."""

    def judged(place: Place) -> bool:
        return place[0] == number and answers.known(place)

    own = answers.asked[number]
    lesioned = answers.changes(number, RELATION, 1.0, "correct")
    random = answers.changes(number, RANDOM, 1.0, "correct")
    return OfOne(
        relation=own.relation,
        wordings=own.wordings,
        asked=len(own.facts),
        known=own.n_known,
        lost=estimate([-v for p, v in lesioned.items() if judged(p)]),
        lost_random=estimate([-v for p, v in random.items() if judged(p)]),
        above_random=estimate(_less(random, lesioned, judged)),
        other_wording=_other_wording(answers, number),
    )


def pairs_of(
    answers: Answers, chosen: dict[tuple[int, int], Tensor], shape: ModelShape
) -> list[Pair]:
    """All ordered pairs of relations.

    Args:
        answers: Of the model.
        chosen: By seed and relation, the neurons silenced.
        shape: Of the model.
    """
    changes = {
        (kind, what, n): answers.changes(n, kind, 1.0, what)
        for kind in (RELATION, RANDOM)
        for what in ("correct", "nats")
        for n in answers.numbers
    }
    found = []
    for left, right in permutations(answers.numbers, 2):

        def less(
            kind: str, number: int, what: str, left: int = left, right: int = right
        ) -> Estimate:
            return estimate(
                _less(
                    changes[kind, what, number],
                    changes[RANDOM, what, left],
                    lambda place: place[0] == right,
                )
            )

        # A third relation, where there is one.
        third = next((n for n in answers.numbers if n not in (left, right)), right)
        random = [v for p, v in changes[RANDOM, "correct", left].items() if p[0] == right]
        sets = [overlap(chosen[seed, left], chosen[seed, right], shape) for seed in answers.seeds]
        found.append(
            Pair(
                lesioned=answers.asked[left].relation,
                judged=answers.asked[right].relation,
                change=less(RELATION, left, "correct"),
                nats=less(RELATION, left, "nats"),
                random_change=float(np.mean(random)),
                control=less(RANDOM, third, "correct"),
                shared=float(np.mean([one.shared for one in sets])),
                chance=float(np.mean([one.chance for one in sets])),
            )
        )
    return found


def _other_wording(answers: Answers, number: int) -> Estimate | None:
    """Facts lost in the second wording, of those known in it, less those lost by random neurons."""
    before, lesioned, random = (
        answers.after(number, kind, times, "correct", 1)
        for kind, times in ((NONE, 0.0), (RELATION, 1.0), (RANDOM, 1.0))
    )
    known = [place for place, right in before.items() if right > 0]
    return estimate([random[place] - lesioned[place] for place in known]) if known else None


def _less(left: Values, right: Values, keep: Callable[[Place], bool]) -> list[float]:
    return [left[place] - right[place] for place in left if place in right and keep(place)]

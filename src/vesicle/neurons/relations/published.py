"""What was published of relation neurons (Liu et al. 2025), and whether it is so here.

- *Cumulativity*: the more of a relation's neurons are silenced, the more of its facts are lost.
- *Versatility*: relations share neurons. A neuron that is chosen *against* all other relations'
  prompts can hardly be chosen for two; so it is asked, with the relation's own prompts left out,
  how well its neurons tell those of the nearest other one.
- *Interference*: one relation's lesion helps another's facts.

Each is measured against random neurons of the same layers and counts; intervals are over relations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vesicle.neurons.claims import Claim, estimate, told, verdict
from vesicle.neurons.relations.answers import Answers
from vesicle.neurons.relations.lesioned import RANDOM, RELATION
from vesicle.neurons.relations.properties import Dose, OfOne, Pair
from vesicle.neurons.relations.selection import Nearest


def claims(
    answers: Answers,
    doses: Sequence[Dose],
    relations: Sequence[OfOne],
    pairs: Sequence[Pair],
    nearest: Sequence[Nearest],
) -> list[Claim]:
    """All claims.

    Args:
        answers: Of the model.
        doses: One of them of size 1.
        relations: Each of them.
        pairs: All ordered pairs.
        nearest: Of each relation the other one that its neurons answer to most.
    """
    found = [*_own(doses), _cumulativity(answers, doses), _versatility(doses, pairs, nearest)]
    found.append(_interference(pairs))
    worded = [one.other_wording.mean for one in relations if one.other_wording is not None]
    if worded:
        lost = estimate(worded)
        found.append(
            Claim(
                name="other wording",
                published="facts are lost in other wordings, too",
                measured="share of own facts lost in a wording that found no neurons, less that "
                "by random neurons",
                found=lost,
                control=f"{len(worded)} relations with facts known in a second wording",
                verdict=verdict(lost),
            )
        )
    return found


def _at_one(doses: Sequence[Dose]) -> Dose:
    return next(dose for dose in doses if dose.times == 1.0)


def _own(doses: Sequence[Dose]) -> list[Claim]:
    one = _at_one(doses)
    return [
        Claim(
            name="existence",
            published="a relation's facts are lost with its neurons, and not with random ones",
            measured="share of its known facts lost, less that by random neurons",
            found=one.above_random,
            control=f"random neurons: {told(one.random)}",
            verdict=verdict(one.above_random),
        ),
        Claim(
            name="specificity",
            published="its own facts suffer most",
            measured="share of its known facts lost, less that of other relations' facts",
            found=one.above_others,
            control=f"others' facts: {told(one.others)}",
            verdict=verdict(one.above_others),
        ),
    ]


def _cumulativity(answers: Answers, doses: Sequence[Dose]) -> Claim:
    least, most = min(dose.times for dose in doses), max(dose.times for dose in doses)
    grown, by_chance = (
        answers.each_lost(kind, most) - answers.each_lost(kind, least)
        for kind in (RELATION, RANDOM)
    )
    found = estimate(grown - by_chance)
    return Claim(
        name="cumulativity",
        published="the more of its neurons are silenced, the more of its facts are lost",
        measured=f"share lost at {most:g} times the neurons, less that at {least:g} times, less "
        "the same of random neurons",
        found=found,
        control=f"random neurons: {told(estimate(by_chance))}",
        verdict=verdict(found),
    )


def _versatility(doses: Sequence[Dose], pairs: Sequence[Pair], nearest: Sequence[Nearest]) -> Claim:
    """By what neurons answer to: sets against each other's negatives hardly share any neuron."""
    one = _at_one(doses)
    found = estimate([row.precision - row.random for row in nearest])
    harmed = sum(pair.change.high < 0 for pair in pairs)
    by_chance = sum(pair.control.high < 0 for pair in pairs)
    return Claim(
        name="versatility",
        published="relations share neurons",
        measured="average precision of a relation's neurons for the nearest other one, less that "
        "of random neurons",
        found=found,
        control=f"random neurons: {np.mean([row.random for row in nearest]):.2f}; neurons in both "
        f"sets {one.shared:.3f}, by chance {one.chance:.3f}; lesions harm {harmed} of "
        f"{len(pairs)} others, random ones {by_chance}",
        verdict=verdict(found),
    )


def _interference(pairs: Sequence[Pair]) -> Claim:
    """Relations are the units: pairs of one relation are not independent of each other."""
    found = estimate(
        [
            float(np.mean([(p.change.low > 0) - float(p.control.low > 0) for p in own]))
            for own in _by_lesioned(pairs)
        ]
    )
    helped = sum(pair.change.low > 0 for pair in pairs)
    by_chance = sum(pair.control.low > 0 for pair in pairs)
    return Claim(
        name="interference",
        published="a relation's lesion can help another's facts",
        measured="share of other relations helped, less that by random neurons",
        found=found,
        control=f"helped are {helped} of {len(pairs)}, by random neurons {by_chance}",
        verdict=verdict(found),
    )


def _by_lesioned(pairs: Sequence[Pair]) -> list[list[Pair]]:
    names = dict.fromkeys(pair.lesioned for pair in pairs)
    return [[pair for pair in pairs if pair.lesioned == name] for name in names]

"""What a model knows of a relation, and which of it finds neurons and which judges them.

A model is asked some facts in each of a relation's first wordings; the best one is kept, and the
second best to judge by too. Unless it knew none of them, it is asked on until it has known as many
as are wanted. Known facts are split in halves: one finds neurons (the published method filters
those in the same way), the other judges lesions, together with as many facts that the model does
*not* know: only those can show that a lesion helps. No subject is on both sides, in any relation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vesicle.errors import DataError
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.facts import Fact, Relation
from vesicle.neurons.relations.questions import Encode, Question, judge, question

LEAST = 8
"""Known facts that a relation needs: four that find neurons, four that judge them."""
_SURVEYED, _WORDINGS = 12, 4
_PATIENCE = 5
"""Facts asked for each that is wanted known, at most."""
_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model was asked of a relation.

    Attributes:
        relation: Its name.
        wordings: The best one, and the second best if any fact is known in it.
        facts: In the order in which they were asked.
        correct: Whether each is known, in the first wording.
        nats: Log probability of each answer, likewise.
    """

    relation: str
    wordings: tuple[str, ...]
    facts: tuple[Fact, ...]
    correct: tuple[bool, ...]
    nats: tuple[float, ...]

    @property
    def n_known(self) -> int:
        """How many are known."""
        return sum(self.correct)

    def question(self, index: int, encode: Encode, wording: int = 0) -> Question | None:
        """One of the facts in one of the wordings; None where it cannot be asked."""
        return question(self.facts[index], self.wordings[wording], encode)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Asked:
        """What `to_dict` wrote."""
        return cls(
            relation=values["relation"],
            wordings=tuple(values["wordings"]),
            facts=tuple(Fact(**fact) for fact in values["facts"]),
            correct=tuple(values["correct"]),
            nats=tuple(values["nats"]),
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which facts do what, by relation and number.

    Attributes:
        found_by: Known facts that find neurons.
        judged_by: Known facts that judge them.
        unknown: Facts that the model does not know and that judge, too.
    """

    found_by: tuple[tuple[int, int], ...]
    judged_by: tuple[tuple[int, int], ...]
    unknown: tuple[tuple[int, int], ...]


def ask(hooked: Hooked, encode: Encode, relation: Relation, wanted: int) -> Asked:
    """Ask a model a relation's facts until it has known as many as are wanted.

    Args:
        hooked: The model.
        encode: Text to token ids.
        relation: Asked are its facts in a random order that is the same every time.
        wanted: Known facts; at most five times as many are asked.
    """
    order = list(relation.facts)
    random.Random(0).shuffle(order)
    ranked, some_known = _ranked(hooked, encode, relation, order[:_SURVEYED])
    if not some_known:
        order = order[:_SURVEYED]
    facts: list[Fact] = []
    correct: list[bool] = []
    nats: list[float] = []
    for start in range(0, min(len(order), _PATIENCE * wanted), _AT_ONCE):
        if sum(correct) >= wanted:
            break
        asked = [
            (fact, q)
            for fact in order[start : start + _AT_ONCE]
            if (q := question(fact, ranked[0], encode)) is not None
        ]
        found = judge(hooked, [q for _, q in asked])
        facts += [fact for fact, _ in asked]
        correct += found.correct.tolist()
        nats += found.nats.tolist()
    return Asked(
        relation=relation.name,
        wordings=tuple(ranked),
        facts=tuple(facts),
        correct=tuple(correct),
        nats=tuple(nats),
    )


def ask_all(
    hooked: Hooked,
    encode: Encode,
    relations: Sequence[Relation],
    wanted: int,
    kept: Callable[[Relation, Callable[[], dict[str, Any]]], dict[str, Any]],
    *,
    named: bool,
    most: int,
) -> list[Asked]:
    """Ask relations, and keep those of which enough is known.

    Args:
        hooked: The model.
        encode: Text to token ids.
        relations: To be asked.
        wanted: Known facts of each.
        kept: Gives what is kept of a relation, or has it made.
        named: Whether all of them must do; otherwise those that do are taken.
        most: Relations taken at most, those with the most known facts, unless they are named.

    Returns:
        Two relations or more, in their order.

    Raises:
        DataError: Too few facts of a relation that was named are known, or of all.
    """
    found = []
    for relation in relations:
        asked = Asked.from_dict(kept(relation, partial(_made, hooked, encode, relation, wanted)))
        if asked.n_known >= LEAST:
            found.append(asked)
        elif named:
            raise DataError(
                f"the model knows {asked.n_known} of {len(asked.facts)} facts of "
                f"{relation.name!r}; needed: {LEAST} and more: name other --relations, or ask "
                "another model"
            )
    if len(found) < 2:
        raise DataError(
            f"of {len(relations)} relations the model knows {LEAST} facts of {len(found)}; needed: "
            "2 relations and more"
        )
    if not named:
        best = sorted(found, key=lambda asked: (-asked.n_known, asked.relation))[:most]
        found = [asked for asked in found if asked in best]
    return found


def split(asked: Sequence[Asked], wanted: int, seed: int) -> Split:
    """Split facts at random into those that find neurons and those that judge them.

    Args:
        asked: Relations.
        wanted: Known facts of each, at most.
        seed: Of the draw.
    """
    rng = random.Random(seed)
    finds: dict[str, bool] = {}
    found_by, judged_by, unknown = [], [], []
    for r, own in enumerate(asked):
        known = [i for i, right in enumerate(own.correct) if right]
        sides: tuple[list[int], list[int]] = ([], [])
        for i in _varied(known, own, rng)[:wanted]:
            # A subject that is on a side already stays there; others even the sides out.
            side = finds.setdefault(own.facts[i].key, len(sides[1]) <= len(sides[0]))
            sides[side].append(i)
        found_by += [(r, i) for i in sides[1]]
        judged_by += [(r, i) for i in sides[0]]
    for r, own in enumerate(asked):
        free = [
            i
            for i, right in enumerate(own.correct)
            if not right and not finds.get(own.facts[i].key, False)
        ]
        count = sum(1 for relation, _ in judged_by if relation == r)
        unknown += [(r, i) for i in rng.sample(free, min(count, len(free)))]
    return Split(found_by=tuple(found_by), judged_by=tuple(judged_by), unknown=tuple(unknown))


def _made(hooked: Hooked, encode: Encode, relation: Relation, wanted: int) -> dict[str, Any]:
    return ask(hooked, encode, relation, wanted).to_dict()


def _ranked(
    hooked: Hooked, encode: Encode, relation: Relation, facts: Sequence[Fact]
) -> tuple[list[str], bool]:
    """The best of a relation's first wordings and, if anything is known in it, the second best.

    And whether anything is known at all.
    """
    scores = []
    for wording in relation.wordings[:_WORDINGS]:
        asked = [q for fact in facts if (q := question(fact, wording, encode)) is not None]
        found = judge(hooked, asked)
        known = int(found.correct.sum())
        scores.append((known, float(found.nats.mean()) if asked else float("-inf"), wording))
    best, *others = sorted(scores, key=lambda score: score[:2], reverse=True)
    return [best[2], *(wording for known, _, wording in others[:1] if known)], best[0] > 0


def _varied(known: Sequence[int], asked: Asked, rng: random.Random) -> list[int]:
    """Known facts in an order that goes round the answers, so that no answer prevails early."""
    order = rng.sample(known, len(known))
    turns: dict[str, int] = {}
    ranked = []
    for i in order:
        answer = asked.facts[i].answer
        turns[answer] = turns.get(answer, -1) + 1
        ranked.append((turns[answer], i))
    return [i for _, i in sorted(ranked, key=lambda pair: pair[0])]

"""Relation neurons across languages: found in one, silenced in others (mParaRel).

Facts whose subject helped to find the neurons are left out in every language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from vesicle.neurons.claims import Claim, estimate, verdict
from vesicle.neurons.finished import Finished, file_name
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.facts import Relation
from vesicle.neurons.relations.knowledge import Asked, Split, ask
from vesicle.neurons.relations.questions import Encode, Question, judge
from vesicle.neurons.relations.settings import RelationSettings
from vesicle.neurons.sets import matched

_LEAST = 4
"""Known facts that a relation needs in a language, to be judged in it."""


def translated(
    hooked: Hooked,
    encode: Encode,
    languages: dict[str, dict[str, Relation]],
    asked: Sequence[Asked],
    splits: Sequence[Split],
    chosen: dict[tuple[int, int], Tensor],
    count: int,
    settings: RelationSettings,
    done: Finished,
) -> dict[str, Any]:
    """Ask the same relations in other languages while their neurons are silenced.

    Args:
        hooked: The model.
        encode: Text to token ids.
        languages: Relations by language and name.
        asked: Those whose neurons were found, in the first language.
        splits: Of each seed.
        chosen: Neurons by seed and relation.
        count: How many of them are silenced.
        settings: Of the analysis.
        done: Keeps the parts.

    Returns:
        `rows`: of each language and relation the facts known, and the share lost less that by
        random neurons; `claims`: one, over both.
    """
    rows: list[dict[str, Any]] = []
    for language, relations in languages.items():
        for n, own in enumerate(asked):
            if own.relation not in relations:
                continue
            relation = relations[own.relation]
            file = f"languages/{file_name(language)}-{file_name(own.relation)}"
            there = Asked.from_dict(
                done.values(f"{file}-asked", partial(_asked, hooked, encode, relation, settings))
            )
            if there.n_known < _LEAST:
                continue
            lost = done.values(
                file, partial(_lost, hooked, encode, own, there, splits, chosen, n, count)
            )
            values = [a - b for a, b in lost]
            if values:
                rows.append(
                    {
                        "language": language,
                        "relation": own.relation,
                        "known": there.n_known,
                        "lost": float(np.mean([a for a, _ in lost])),
                        "lost_random": float(np.mean([b for _, b in lost])),
                        "lost_above_random": asdict(estimate(values)),
                    }
                )
    if not rows:
        return {"rows": [], "claims": []}
    found = estimate([row["lost_above_random"]["mean"] for row in rows])
    by_chance = float(np.mean([row["lost_random"] for row in rows]))
    claim = Claim(
        name="across languages",
        published="neurons that were found in one language act in others",
        measured="share of facts lost in other languages, less that by random neurons",
        found=found,
        control=f"random neurons lose {by_chance:.3f}",
        verdict=verdict(found),
    )
    return {"rows": rows, "claims": [asdict(claim)]}


def _asked(
    hooked: Hooked, encode: Encode, relation: Relation, settings: RelationSettings
) -> dict[str, Any]:
    return ask(hooked, encode, relation, settings.facts).to_dict()


def _lost(
    hooked: Hooked,
    encode: Encode,
    own: Asked,
    there: Asked,
    splits: Sequence[Split],
    chosen: dict[tuple[int, int], Tensor],
    number: int,
    count: int,
) -> list[tuple[float, float]]:
    """Of each known fact the share of seeds in which it is lost, and by random neurons."""
    found: dict[int, list[tuple[float, float]]] = {}
    for seed, split in enumerate(splits):
        used = {own.facts[i].key for r, i in split.found_by if r == number}
        asked: list[tuple[int, Question]] = [
            (i, q)
            for i, right in enumerate(there.correct)
            if right
            and there.facts[i].key not in used
            and (q := there.question(i, encode)) is not None
        ]
        neurons = chosen[seed, number][:count]
        drawn = matched(neurons, hooked.shape, np.random.default_rng([seed, number, 2]))
        questions = [q for _, q in asked]
        lost = 1 - judge(hooked, questions, neurons).correct.double()
        by_chance = 1 - judge(hooked, questions, drawn).correct.double()
        for (i, _), a, b in zip(asked, lost.tolist(), by_chance.tolist(), strict=True):
            found.setdefault(i, []).append((a, b))
    return [(float(a), float(b)) for a, b in (np.mean(v, axis=0) for v in found.values())]

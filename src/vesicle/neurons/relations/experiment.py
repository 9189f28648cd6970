"""Relation neurons from facts to claims, in parts that are kept.

    asked/RELATION.json         what the model knows of a relation
    neurons.safetensors         of each seed and relation the neurons, and how specific they are
    lesions/SEED-RELATION.json  what it answers while they are silenced
    languages/...               the same of facts in other languages

The same command goes on where it was cut off. Three seeds are three splits of the facts and three
draws of random neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import DataError
from vesicle.neurons.finished import Finished, file_name
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.answers import Answers, Run
from vesicle.neurons.relations.facts import Relation
from vesicle.neurons.relations.knowledge import Asked, Split, ask_all, split
from vesicle.neurons.relations.lesioned import Lesioned, lesion_relation
from vesicle.neurons.relations.properties import dose, of_one, pairs_of
from vesicle.neurons.relations.published import claims
from vesicle.neurons.relations.questions import Encode
from vesicle.neurons.relations.selection import choose, nearest_of
from vesicle.neurons.relations.settings import RelationSettings
from vesicle.neurons.relations.translated import translated
from vesicle.neurons.sets import layer_counts

Show = Callable[[int, int, str], None]
"""Told how many parts are done, of how many, and what comes."""


def find_relation_neurons(
    hooked: Hooked,
    encode: Encode,
    relations: Sequence[Relation],
    settings: RelationSettings,
    out: Path,
    *,
    facts: dict[str, Any],
    named: bool = False,
    languages: dict[str, dict[str, Relation]] | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """Find relation neurons, silence them, and test what was published of them.

    Args:
        hooked: The dense model.
        encode: Text to token ids.
        relations: To be asked.
        settings: How.
        out: Folder that keeps finished parts.
        facts: What else the result depends on, such as the model's name (JSON).
        named: Whether the relations were named: then all of them must be known well enough.
        languages: The same relations in other languages, by language and name.
        show: Told how far it is.

    Returns:
        The report: `relations`, `doses`, `pairs`, `nearest`, `claims`, `specificity`, `layers`,
        `settings` and, with languages, `languages`.

    Raises:
        DataError: A setting is out of range, or too few facts are known.
        VesicleError: The folder holds another analysis.
    """
    settings.check()
    shape = hooked.shape
    count = max(1, round(settings.neurons * shape.n_layers * shape.ffn_width))
    about = {**asdict(settings), **facts, "asked": [relation.name for relation in relations]}
    done = Finished(out, about)
    steps = _Steps(
        show, len(relations) + 1 + settings.seeds * min(len(relations), settings.relations)
    )

    def kept(relation: Relation, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        steps.next(f"asking {relation.name}")
        return done.values(f"asked/{file_name(relation.name)}", make)

    asked = ask_all(
        hooked, encode, relations, settings.facts, kept, named=named, most=settings.relations
    )
    splits = [split(asked, settings.facts, seed) for seed in range(settings.seeds)]
    _check_splits(asked, splits)
    steps.total = len(relations) + 1 + settings.seeds * len(asked)
    steps.next("reading activations")
    most = max(1, round(max(settings.times) * count))
    found = done.tensors(
        "neurons", partial(choose, hooked, encode, asked, splits, settings.reading, count, most)
    )
    chosen = {
        (seed, n): found["ranked"][seed, n].long()
        for seed in range(settings.seeds)
        for n in range(len(asked))
    }
    run: Run = {}
    for seed, own in enumerate(splits):
        for n, relation in enumerate(asked):
            steps.next(f"seed {seed}, {relation.relation}")
            make = partial(
                _lesioned, hooked, encode, asked, own, n, chosen[seed, n], count, settings, seed
            )
            rows = done.values(f"lesions/{seed}-{file_name(relation.relation)}", make)
            run[seed, n] = [Lesioned.from_dict(row) for row in rows]
    answers = Answers(asked, run)
    doses = [
        dose(answers, chosen, shape, t, max(1, round(t * count))) for t in sorted(settings.times)
    ]
    each = [of_one(answers, n) for n in range(len(asked))]
    first = {place: neurons[:count] for place, neurons in chosen.items()}
    pairs = pairs_of(answers, first, shape)
    nearest = nearest_of([own.relation for own in asked], found)
    report: dict[str, Any] = {
        "settings": about,
        "neurons": count,
        "claims": [asdict(claim) for claim in claims(answers, doses, each, pairs, nearest)],
        "doses": [asdict(row) for row in doses],
        "relations": [asdict(row) for row in each],
        "pairs": [asdict(pair) for pair in pairs],
        "nearest": [asdict(row) for row in nearest],
        "specificity": {
            name: found[name].mean(0).tolist()
            for name in ("held_out", "shuffled", "random", "ties")
        },
        # Of all seeds together.
        "layers": {
            own.relation: layer_counts(
                torch.cat([first[seed, n] for seed in range(settings.seeds)]), shape
            ).tolist()
            for n, own in enumerate(asked)
        },
    }
    if languages:
        report["languages"] = translated(
            hooked, encode, languages, asked, splits, chosen, count, settings, done
        )
    steps.end()
    return report


def _lesioned(
    hooked: Hooked,
    encode: Encode,
    asked: Sequence[Asked],
    own: Split,
    number: int,
    ranked: Tensor,
    count: int,
    settings: RelationSettings,
    seed: int,
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, number])
    found = lesion_relation(hooked, encode, asked, own, number, ranked, count, settings.times, rng)
    return [row.to_dict() for row in found]


def _check_splits(asked: Sequence[Asked], splits: Sequence[Split]) -> None:
    """Refuse relations whose subjects are all on one side.

    Raises:
        DataError: Naming the relation.
    """
    for own in splits:
        for n, relation in enumerate(asked):
            for side in (own.found_by, own.judged_by):
                if sum(1 for r, _ in side if r == n) < 2:
                    raise DataError(
                        f"known facts of {relation.relation!r} share their subjects with other "
                        "relations', and cannot be split; ask more --facts, or other --relations"
                    )


class _Steps:
    """Counts parts as they begin."""

    def __init__(self, show: Show | None, total: int) -> None:
        self.show, self.total, self.done = show, total, -1

    def next(self, what: str) -> None:
        self.done += 1
        if self.show is not None:
            self.show(self.done, self.total, what)

    def end(self) -> None:
        if self.show is not None:
            self.show(self.total, self.total, "")

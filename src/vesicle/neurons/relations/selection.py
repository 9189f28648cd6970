"""Which neurons are a relation's, and how well they tell its new facts, and other relations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.knowledge import Asked, Split
from vesicle.neurons.relations.questions import Encode, activations
from vesicle.neurons.relations.statistics import average_precision, most_specific
from vesicle.neurons.sets import matched


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The other relation that a relation's neurons answer to most.

    Chosen by the facts that find neurons; average precisions are of the facts that judge, with the
    relation's own prompts left out, and means over seeds.

    Attributes:
        relation: Whose neurons.
        other: In most seeds.
        precision: With which they tell the other's prompts from the rest.
        random: The same of random neurons.
    """

    relation: str
    other: str
    precision: float
    random: float


def choose(
    hooked: Hooked,
    encode: Encode,
    asked: Sequence[Asked],
    splits: Sequence[Split],
    reading: str,
    count: int,
    most: int,
) -> dict[str, Tensor]:
    """Of each seed (S) and relation (R) its neurons, and how specific they are to new facts.

    Args:
        hooked: The model.
        encode: Text to token ids.
        asked: Relations.
        splits: Of the facts, one a seed.
        reading: Of activations, `mean` or `last`.
        count: A relation's neurons.
        most: How many are ranked.

    Returns:
        `ranked` (S, R, most); `held_out` (S, R) the mean average precision of the first neurons on
        the facts that judge; `shuffled` the same where the labels were shuffled before neurons were
        chosen, `random` of random neurons of the same layers; `ties` (S, R) how many neurons have
        the same average precision as the first. `others_found` (S, R, R) how well a relation's
        neurons tell another relation's prompts from the rest, its own left out, on the facts that
        find neurons; `others` on those that judge, and `others_random` of random neurons.
    """
    used = sorted({place for own in splits for place in (*own.found_by, *own.judged_by)})
    questions = [asked[r].question(i, encode) for r, i in used]
    scores = activations(hooked, [q for q in questions if q is not None], reading)
    row = {place: i for i, place in enumerate(used)}
    size = (len(splits), len(asked))
    ranked = torch.zeros(*size, most, dtype=torch.int32)
    told = {name: torch.zeros(size) for name in ("held_out", "shuffled", "random", "ties")}
    told |= {
        name: torch.zeros(*size, len(asked)) for name in ("others_found", "others", "others_random")
    }
    for seed, own in enumerate(splits):
        rng = np.random.default_rng([seed, 1])
        labels = torch.tensor([r for r, _ in own.found_by])
        new = torch.tensor([r for r, _ in own.judged_by])
        x = scores[[row[place] for place in own.found_by]]
        judged = scores[[row[place] for place in own.judged_by]]
        mixed = labels[torch.from_numpy(rng.permutation(len(labels)))]
        for n in range(len(asked)):
            best = most_specific(x, labels == n, most)
            ranked[seed, n] = best.int()
            precision = average_precision(x, labels == n)
            told["ties"][seed, n] = (precision == precision.max()).sum()
            sets = {
                "held_out": best[:count],
                "shuffled": most_specific(x, mixed == n, count),
                "random": matched(best[:count], hooked.shape, rng),
            }
            for name, neurons in sets.items():
                told[name][seed, n] = average_precision(judged[:, neurons], new == n).mean()
            for name, values, of, neurons in (
                ("others_found", x, labels, sets["held_out"]),
                ("others", judged, new, sets["held_out"]),
                ("others_random", judged, new, sets["random"]),
            ):
                rest = of != n
                for other in set(range(len(asked))) - {n}:
                    told[name][seed, n, other] = average_precision(
                        values[:, neurons][rest], of[rest] == other
                    ).mean()
    return {"ranked": ranked, **told}


def nearest_of(names: Sequence[str], found: dict[str, Tensor]) -> list[Nearest]:
    """Of each relation the other one that its neurons answer to most.

    Args:
        names: R relations.
        found: `others_found`, `others` and `others_random` (S, R, R) average precisions: a row a
            relation whose neurons are meant, a column the other one.
    """
    rows = []
    for n, name in enumerate(names):
        # Its own column is 0, and never the highest.
        others = found["others_found"][:, n].argmax(-1)
        seeds = range(len(others))
        rows.append(
            Nearest(
                relation=name,
                other=names[int(others.mode().values)],
                precision=float(found["others"][seeds, n, others].mean()),
                random=float(found["others_random"][seeds, n, others].mean()),
            )
        )
    return rows

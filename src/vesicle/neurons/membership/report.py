"""What a membership experiment found: AUCs by seed and over seeds, controls, and the claims.

A claim holds if the whole interval of 95 % lies on its side of 0, does not hold if all of it lies
on the other, and is not told apart otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesicle.neurons.membership.attack import ATTACKS, PLAINEST, PUBLISHED
from vesicle.neurons.membership.auc import difference, estimate
from vesicle.neurons.membership.bag_of_words import BAG_OF_WORDS
from vesicle.neurons.membership.chance import chance
from vesicle.neurons.membership.corpus import Corpus
from vesicle.neurons.membership.precision import SHARES
from vesicle.neurons.membership.settings import ExperimentSettings
from vesicle.plan import FloatArray

SCHEMA = "vesicle-membership-1"
JUDGED = (PUBLISHED, PLAINEST)
"""The attacks by which parts of documents and precisions are judged."""
_SAID = {PUBLISHED: "yes, 0.86 and 0.68", PLAINEST: "hardly"}
"""What the paper found of them, on books and on papers."""
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "not told apart"
Records = Mapping[tuple[int, str, str], dict[str, Any]]
"""By seed, decoder and precision."""
Row = dict[str, Any]


def area_rows(
    scores: Mapping[str, FloatArray], labels: NDArray[np.bool_], folds: NDArray[np.int64]
) -> list[Row]:
    """A row for each attack: its AUC over runs, and in each of them.

    Args:
        scores: (R, N) of R runs by the attacks' names.
        labels: (R, N), true for members.
        folds: (N,).
    """
    return [
        {
            "attack": name,
            **estimate(own, labels, folds).row(),
            "by_seed": [
                estimate(one, truth, folds).row() for one, truth in zip(own, labels, strict=True)
            ],
        }
        for name, own in scores.items()
    ]


def experiment_report(
    corpus: Corpus, labels: NDArray[np.bool_], settings: ExperimentSettings, records: Records
) -> Row:
    """The report of an experiment, as JSON has it.

    Args:
        corpus: The documents.
        labels: (R, N) the members of each seed.
        settings: Of the experiment.
        records: Of its parts.
    """
    folds, seeds = corpus.folds, range(settings.seeds)
    words = [records[seed, BAG_OF_WORDS, ""] for seed in seeds]
    decoders: list[Row] = []
    whole: dict[str, dict[str, FloatArray]] = {}
    for name, size in settings.sizes.items():
        own = [records[seed, name, "full"] for seed in seeds]
        whole[name] = stacked([record["scores"] for record in own])
        decoders.append(
            {
                "decoder": name,
                "width": size.width,
                "layers": size.n_layers,
                "loss": _mean([record["loss"] for record in own]),
                "attacks": area_rows(whole[name], labels, folds),
                "other_splits": chance(np.array([record["other_splits"] for record in own])),
                "lengths": [
                    length_row(n, [r["lengths"][str(n)] for r in own], whole[name], labels, folds)
                    for n in settings.attacked.lengths
                ],
            }
        )
    first = next(iter(settings.sizes))
    precisions = [
        precision_row(
            p.name, [records[s, first, p.name] for s in seeds], whole[first], labels, folds
        )
        for p in settings.attacked.precisions
    ]
    return {
        "schema": SCHEMA,
        "documents": len(corpus.ids),
        "tokens": sum(map(len, corpus.ids)),
        "fingerprint": corpus.fingerprint,
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "bag_of_words": {
            **area_rows(
                {BAG_OF_WORDS: np.array([r["scores"][BAG_OF_WORDS] for r in words])},
                labels,
                folds,
            )[0],
            "chance": chance(np.array([record["other_splits"] for record in words])),
        },
        "decoders": decoders,
        "precisions": precisions,
        "claims": claims(decoders, precisions, whole, labels, folds),
    }


def length_row(
    n: int,
    records: list[dict[str, list[float]]],
    whole: Mapping[str, FloatArray],
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> Row:
    """What R runs tell from the first n tokens, and how much less than from `whole` documents."""
    scores = stacked(records)
    return {
        "tokens": n,
        "attacks": area_rows(scores, labels, folds),
        "less": _less(scores, whole, labels, folds),
    }


def precision_row(
    name: str,
    records: list[dict[str, Any]],
    whole: Mapping[str, FloatArray],
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> Row:
    """What R runs tell at a precision, and how much less than at the full one."""
    scores = stacked([record["scores"] for record in records])
    shares = [{key: record[key] for key in (*SHARES, "top")} for record in records]
    return {
        "precision": name,
        **_mean(shares),
        "loss": _mean([record["loss"] for record in records]),
        "attacks": area_rows(scores, labels, folds),
        "less": _less(scores, whole, labels, folds),
    }


def claims(
    decoders: list[Row],
    precisions: list[Row],
    whole: Mapping[str, Mapping[str, FloatArray]],
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> list[Row]:
    """What may be so, what the paper says of it, and what is found here.

    Args:
        decoders: Rows of them, the first of which all but sizes are judged by.
        precisions: Rows of those, the full one first.
        whole: (R, N) scores by the names of decoders and attacks.
        labels: (R, N), true for members.
        folds: (N,).
    """
    first, names = decoders[0], list(whole)
    scores = whole[names[0]]
    found = []

    def compare(claim: str, published: str, ours: FloatArray, theirs: FloatArray) -> None:
        found.append(_claim(claim, published, difference(ours, theirs, labels, folds).row(), 1))

    for attack in JUDGED:
        area = next(row for row in first["attacks"] if row["attack"] == attack)
        above = {key: round(area[key] - 0.5, 4) for key in ("auc", "low", "high")}
        found.append(_claim(f"{attack}: above 0.5", _SAID[attack], above, 1))
    best = scores[PUBLISHED]
    compare(
        f"{PUBLISHED} above none/histogram", "yes, +0.29, +0.10", best, scores["none/histogram"]
    )
    compare(
        f"{PUBLISHED} above max-tf/aggregate", "yes, +0.24, +0.05", best, scores["max-tf/aggregate"]
    )
    compare(f"{PUBLISHED} above {PLAINEST}", "yes", best, scores[PLAINEST])
    for attack in JUDGED:
        if len(names) > 1:
            larger, smaller = whole[names[1]][attack], scores[attack]
            compare(f"{attack}: {names[1]} above {names[0]}", "no", larger, smaller)
        for row in first["lengths"]:
            less = row["less"][attack]
            claim = f"{attack}: {row['tokens']} tokens below all"
            found.append(_claim(claim, "yes, slowly", less, -1))
        for row in precisions[1:]:
            claim = f"{attack}: {row['precision']} below full"
            found.append(_claim(claim, "little", row["less"][attack], -1))
    return found


def _claim(claim: str, published: str, area: Row, side: int) -> Row:
    return {"claim": claim, "published": published, **area, "verdict": _verdict(area, side)}


def _less(
    scores: Mapping[str, FloatArray],
    whole: Mapping[str, FloatArray],
    labels: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> dict[str, Row]:
    """By each of `JUDGED`, its AUC less that from the whole documents at full precision."""
    return {name: difference(scores[name], whole[name], labels, folds).row() for name in JUDGED}


def _verdict(area: Row, side: int) -> str:
    """Whether a difference lies above 0 (side 1) or below it (-1)."""
    low, high = sorted((side * area["low"], side * area["high"]))
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else UNTOLD


def stacked(records: list[dict[str, list[float]]]) -> dict[str, FloatArray]:
    """(R, N) scores by attack, in the order of `ATTACKS`."""
    names = [name for name in ATTACKS if name in records[0]]
    return {name: np.array([record[name] for record in records]) for name in names}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}

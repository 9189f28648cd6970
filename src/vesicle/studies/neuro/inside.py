"""Tables of what was looked at inside: levels, doses, lesions, pollution, hybrids, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vesicle.predictors.delays import TAPS
from vesicle.studies.corpora import TASKS
from vesicle.studies.estimates import Records, Row, by_seed, compared, estimate
from vesicle.studies.neuro.hybrids import REMEMBERING, SETS
from vesicle.studies.neuro.judging import Point
from vesicle.studies.neuro.pruning import KEPT
from vesicle.studies.neuro.tables import DENSE, losses_at, points_of


def levels(records: Records) -> dict[str, Any]:
    """Mean levels by what tokens are, over seeds; correlations with need, seed by seed."""
    seeds = by_seed(records, "levels")
    names = seeds[0]["transmitters"]
    return {
        "cost": _mean(s["cost"] for s in seeds),
        "by_task": {
            task: {name: _mean(s["by_task"][task][name] for s in seeds) for name in names}
            for task in TASKS
        },
        "by_layer": [
            {name: _mean(s["by_layer"][layer][name] for s in seeds) for name in names}
            for layer in range(len(seeds[0]["by_layer"]))
        ],
        "need": {
            task: {name: [s["need"][task][name] for s in seeds] for name in names} for task in TASKS
        },
        "tokens": {
            name: {
                key: _groups([s["tokens"][name][key] for s in seeds])
                for key in ("by_class", "by_position", "by_frequency")
            }
            | {
                "with_entropy": [s["tokens"][name]["with_entropy"] for s in seeds],
                "lowest": seeds[0]["tokens"][name]["lowest"],
                "highest": seeds[0]["tokens"][name]["highest"],
            }
            for name in names
        },
    }


def doses(records: Records) -> list[Row]:
    """Loss over rest and cost of each transmitter held at each level."""
    seeds = by_seed(records, "doses")
    keys = dict.fromkeys((row["transmitter"], row["dose"]) for row in seeds[0]["rows"])

    def losses(transmitter: str, dose: float) -> list[list[float]]:
        return [
            [
                v
                for row in record["rows"]
                if (row["transmitter"], row["dose"]) == (transmitter, dose)
                for v in row["losses"]
            ]
            for record in seeds
        ]

    return [
        {
            "transmitter": transmitter,
            "dose": dose,
            "cost": _mean(
                row["cost"]
                for record in seeds
                for row in record["rows"]
                if (row["transmitter"], row["dose"]) == (transmitter, dose)
            ),
            "rise": compared(losses(transmitter, dose), losses(transmitter, 1.0)),
        }
        for transmitter, dose in keys
    ]


def lesions(records: Records) -> list[Row]:
    """What each task and class loses where a transmitter is flat, or rests."""
    seeds = by_seed(records, "lesions")
    rows, keys = [], ("task", "transmitter", "how")
    for which in dict.fromkeys(tuple(r[k] for k in keys) for s in seeds for r in s["rows"]):
        own = [r for s in seeds for r in s["rows"] if tuple(r[k] for k in keys) == which]
        rows.append(
            {
                **dict(zip(keys, which, strict=True)),
                "seeds": len(own),
                "cost": _mean(row["cost"] for row in own),
                "more": estimate([row["more"] for row in own]),
                "by_class": _groups([row["by_class"] for row in own]),
            }
        )
    return rows


def pollution(records: Records) -> list[Row]:
    """Both halves' losses over all dense, over tasks."""
    seeds = by_seed(records, "pollution")
    names = dict.fromkeys(row["what"] for row in seeds[0]["rows"])

    def of(name: str, key: str) -> Row:
        return estimate(
            [[v for row in s["rows"] if row["what"] == name for v in row[key]] for s in seeds]
        )

    return [
        {"what": name, **{key: of(name, key) for key in ("approximate", "dense_after")}}
        for name in names
    ]


def hybrids(records: Records, budgets: Sequence[float]) -> list[Row]:
    """Each set of systems, with the whole cache and with half: rise over dense at each cost."""
    dense = losses_at(points_of(records, DENSE), None)
    assert dense is not None
    rows = []
    for name, systems in {DENSE: (), **SETS}.items():
        for halved in (False, True):
            if halved and name not in REMEMBERING:
                continue
            points = (
                [record["points"] for record in by_seed(records, f"memory/{name}")]
                if halved
                else points_of(records, name)
            )
            at_rest = losses_at(points, None)
            assert at_rest is not None
            rows.append(
                {
                    "systems": [*systems, *(["memory"] if halved else [])],
                    "undivided": {
                        "cost": _mean(own[0]["cost"] for own in points),
                        "rise": compared(at_rest, dense),
                    },
                    "budgets": [
                        {"cost": cost, "rise": _rise(points, dense, cost)} for cost in budgets
                    ],
                }
            )
    return rows


def _rise(points: Sequence[Sequence[Point]], dense: Any, cost: float) -> Row | None:
    own = losses_at(points, cost)
    return None if own is None else compared(own, dense)


def pruned(records: Records, budgets: Sequence[float]) -> list[Row]:
    """How much more is lost with fewer taps than with all, at each cost."""
    seeds = by_seed(records, "pruned")
    whole = [record["points"][str(TAPS)] for record in seeds]
    rows = []
    for keep in KEPT[1:]:
        own = [record["points"][str(keep)] for record in seeds]
        row: Row = {"kept": keep, "budgets": []}
        for cost in budgets:
            mine, theirs = losses_at(own, cost), losses_at(whole, cost)
            there = mine is not None and theirs is not None
            row["budgets"].append({"cost": cost, "more": compared(mine, theirs) if there else None})
        rows.append(row)
    return rows


def times(records: Records, shapes: Sequence[str]) -> list[Row]:
    """A decoded token's time and what was executed, by dial."""
    found = []
    for name in ("trained", *shapes):
        job = "speed/trained/0" if name == "trained" else f"speed/{name}"
        record = records[job]
        for row in record["rows"]:
            found.append({"what": name, "parameters": record.get("parameters"), **row})
    return found


def _groups(seeds: Sequence[Sequence[Row]]) -> list[Row]:
    """Means by group over seeds, weighted by tokens; the order is of the first."""
    found = []
    for group in dict.fromkeys(row["name"] for own in seeds for row in own):
        own = [row for rows in seeds for row in rows if row["name"] == group]
        tokens = sum(row["tokens"] for row in own)
        mean = sum(row["mean"] * row["tokens"] for row in own) / tokens
        found.append({"name": group, "tokens": tokens, "mean": round(mean, 4)})
    return found


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)

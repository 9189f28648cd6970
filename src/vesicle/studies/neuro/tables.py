"""The study's tables, made from the records of its jobs alone.

Losses are nats a target; differences are paired by text and seed, and each text weighs the same.
What a variant cannot reach along its dial has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vesicle.studies.corpora import TASKS
from vesicle.studies.estimates import Records, Row, by_seed, compared, estimate
from vesicle.studies.neuro.judging import Point, at_cost
from vesicle.studies.neuro.variants import Variant, of_group, variants

DENSE, WHOLE = "dense", "transmitters"
_DRAWS = 2000


def points_of(records: Records, name: str) -> list[list[Point]]:
    """Of each seed the points along a variant's dial."""
    return [record["points"] for record in by_seed(records, f"variant/{name}")]


def losses_at(
    points: Sequence[Sequence[Point]], cost: float | None, task: str | None = None
) -> list[list[float]] | None:
    """(seeds, texts) losses at a cost, or undivided if None; None where a seed cannot reach it."""
    found = []
    for own in points:
        losses = own[0]["losses"] if cost is None else at_cost(own, cost)
        if losses is None:
            return None
        found.append([v for name in TASKS for v in losses[name] if task in (None, name)])
    return found


def compared_at(
    records: Records, name: str, rival: str, cost: float, task: str | None = None
) -> Row | None:
    """By how much a variant loses more than another at a cost; than `dense`, at rest."""
    own = losses_at(points_of(records, name), cost, task)
    other = losses_at(points_of(records, rival), None if rival == DENSE else cost, task)
    return None if own is None or other is None else compared(own, other)


def group_table(records: Records, group: str, budgets: Sequence[float]) -> list[Row]:
    """Variants of a group beside the whole: what they lose over dense, and more than the whole."""
    rows = []
    for variant in [*of_group("whole"), *of_group(group)]:
        if variant.name == DENSE:
            continue
        rows.append(_row(records, variant, budgets))
    return rows


def _row(records: Records, variant: Variant, budgets: Sequence[float]) -> Row:
    points = points_of(records, variant.name)
    undivided, dense = losses_at(points, None), losses_at(points_of(records, DENSE), None)
    assert undivided is not None
    assert dense is not None
    first = by_seed(records, f"variant/{variant.name}")[0]
    row: Row = {
        "name": variant.name,
        "says": variant.says,
        "source": variant.source,
        "parameters": first["parameters"] + first["added"],
        "at_rest": compared(undivided, dense),
        "least_cost": round(float(np.mean([min(p["cost"] for p in own) for own in points])), 4),
        "budgets": [],
    }
    if not variant.modulated:
        own = float(np.mean([p[0]["cost"] for p in points]))
        whole = losses_at(points_of(records, WHOLE), own)
        row["own_cost"] = round(own, 4)
        row["beyond_whole"] = None if whole is None else compared(undivided, whole)
        return row
    for cost in budgets:
        row["budgets"].append(
            {
                "cost": cost,
                "rise": compared_at(records, variant.name, DENSE, cost),
                "beyond_whole": None
                if variant.name == WHOLE
                else compared_at(records, variant.name, WHOLE, cost),
            }
        )
    return row


def task_table(records: Records, names: Sequence[str], budgets: Sequence[float]) -> list[Row]:
    """What some variants lose over dense, task by task."""
    rows = []
    for task in TASKS:
        dense = losses_at(points_of(records, DENSE), None, task)
        assert dense is not None
        for name in names:
            rows.append(
                {
                    "task": task,
                    "name": name,
                    "dense": estimate(dense),
                    "budgets": [
                        {"cost": cost, "rise": compared_at(records, name, DENSE, cost, task)}
                        for cost in budgets
                    ],
                }
            )
    return rows


def earned(records: Records, budgets: Sequence[float]) -> list[Row]:
    """What each transmitter gains when it is added last, and what it does alone."""
    rows = []
    for transmitter in variants()[WHOLE].transmitters:
        rows.append(
            {
                "transmitter": transmitter,
                "budgets": [
                    {
                        "cost": cost,
                        "added_last": compared_at(records, f"without-{transmitter}", WHOLE, cost),
                        "alone": compared_at(records, f"only-{transmitter}", DENSE, cost),
                    }
                    for cost in budgets
                ],
            }
        )
    return rows


def control_table(records: Records, budgets: Sequence[float]) -> list[Row]:
    """Controls at each budget: how much more they lose than what was learnt, on the same texts."""
    seeds = by_seed(records, "controls")
    names = list(dict.fromkeys(row["name"] for record in seeds for row in record["rows"]))
    rows = []
    for name in names:
        row: Row = {"name": name, "budgets": []}
        for cost in budgets:
            own, learnt = (_control(seeds, n, cost) for n in (name, "learnt"))
            there = own is not None and learnt is not None
            row["budgets"].append({"cost": cost, "more": compared(own, learnt) if there else None})
        rows.append(row)
    return rows


def _control(seeds: Sequence[Row], name: str, cost: float) -> Any:
    """(seeds, texts) losses; None unless all tasks of all seeds are there."""
    found = []
    for record in seeds:
        by_task = {
            row["task"]: row["losses"]
            for row in record["rows"]
            if row["name"] == name and row["budget"] == cost
        }
        if set(by_task) != set(TASKS):
            return None
        found.append([v for task in TASKS for v in by_task[task]])
    return found


def scaling(
    records: Records, sizes: Sequence[tuple[int, int]], budgets: Sequence[float]
) -> dict[str, Any]:
    """What is lost and gained by size, and how the gain over uniform goes with it.

    Args:
        records: Of all jobs.
        sizes: Widths and layers beside the study's own.
        budgets: Costs.
    """
    rows = []
    for sized in [None, *sizes]:
        behind = "" if sized is None else f"-{sized[0]}x{sized[1]}"
        names = [f"{name}{behind}" for name in (DENSE, WHOLE, "uniform")]
        dense, whole, uniform = (points_of(records, name) for name in names)
        at_rest = losses_at(dense, None)
        assert at_rest is not None
        row: Row = {
            "parameters": by_seed(records, f"base{behind}")[0]["parameters"],
            "dense": estimate(at_rest),
            "budgets": [],
        }
        for cost in budgets:
            own, other = losses_at(whole, cost), losses_at(uniform, cost)
            row["budgets"].append(
                {
                    "cost": cost,
                    "rise": None if own is None else compared(own, at_rest),
                    "gain": None if own is None or other is None else compared(other, own),
                }
            )
        rows.append(row)
    rows.sort(key=lambda r: int(r["parameters"]))
    return {"rows": rows, "fits": [_fit(rows, i, cost) for i, cost in enumerate(budgets)]}


def _fit(rows: Sequence[Row], place: int, cost: float) -> Row:
    """A line through gains against the logarithm of parameters, with its uncertainty over seeds."""
    points = [
        (np.log10(row["parameters"]), value)
        for row in rows
        if row["budgets"][place]["gain"] is not None
        for value in row["budgets"][place]["gain"]["by_seed"]
    ]
    if len({x for x, _ in points}) < 2:
        return {"cost": cost, "slope": None}
    xs, ys = (np.array(v) for v in zip(*points, strict=True))
    rng, slopes = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        drawn = rng.integers(0, len(xs), len(xs))
        if len(set(xs[drawn])) > 1:
            slopes.append(np.polyfit(xs[drawn], ys[drawn], 1)[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    slope, start = np.polyfit(xs, ys, 1)
    return {
        "cost": cost,
        "slope": round(float(slope), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "at_a_million": round(float(start + 6 * slope), 5),
    }


def curves(
    records: Records, names: Sequence[str], loss: Callable[[Sequence[float]], float]
) -> dict[str, list[tuple[float, float]]]:
    """Cost and loss of variants along their dials, over seeds, tasks and texts."""
    found = {}
    for name in names:
        by_place = zip(*points_of(records, name), strict=True)
        found[name] = sorted(
            (
                float(np.mean([p["cost"] for p in place])),
                loss([v for p in place for own in p["losses"].values() for v in own]),
            )
            for place in by_place
        )
    return found

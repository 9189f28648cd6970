"""Do runs of the same tasks agree, item by item, whoever executed them?

vesicle eval squad race --method dense --budget 1 --out runs/a --weights fp32
vesicle eval squad race --method dense --budget 1 --out runs/b --through reference
vesicle eval squad race --method dense --budget 1 --out runs/c --through transformers
python benchmarks/agreement.py runs/a runs/b runs/c --out agreement.json

Fails (status 1) if a score in percent differs by more than half a point, or if a choice by
log-likelihood differs on any item.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.report.results import TaskResult, TaskRow
from vesicle.files import write_json

POINTS = 0.5
RELATIVE = 0.005
"""Of perplexity and bits per byte, which are not in percent."""


def compare(results: list[TaskResult]) -> dict[str, Any]:
    """Dense rows of several runs, held against the first; `agrees` sums it up.

    Raises:
        DataError: The runs do not have the same tasks and items.
    """
    first = results[0]
    names = [_name(r) for r in results]
    for name, result in zip(names, results, strict=True):
        if [t["name"] for t in result.tasks] != [t["name"] for t in first.tasks]:
            raise DataError(f"{name} has other tasks than {names[0]}")
    tasks = []
    for task in first.tasks:
        rows = [_dense(r, task["name"]) for r in results]
        for name, row in zip(names, rows, strict=True):
            if row.items["ids"] != rows[0].items["ids"]:
                raise DataError(f"{name} has other items of {task['name']} than {names[0]}")
        metrics = {}
        for metric in task["metrics"]:
            values = [row.scores[metric["name"]].value for row in rows]
            own = [row.items["statistics"][metric["name"]] for row in rows]
            differing = [sum(a != b for a, b in zip(own[0], other, strict=True)) for other in own]
            exact = task["kind"] == "choose"
            largest = max(abs(v - values[0]) for v in values)
            allowed = POINTS if metric["percent"] else RELATIVE * values[0]
            agrees = not any(differing) if exact else largest <= allowed
            metrics[metric["name"]] = {
                "title": metric["title"],
                "values": values,
                "items_that_differ": differing,
                "largest_difference": largest,
                "agrees": agrees,
            }
        tasks.append({"name": task["name"], "n_items": task["n_items"], "metrics": metrics})
    return {
        "schema": "vesicle-agreement-1",
        "executors": names,
        "versions": first.versions,
        "hardware": first.hardware,
        "config": first.config,
        "tasks": tasks,
        "agrees": all(m["agrees"] for t in tasks for m in t["metrics"].values()),
    }


def _name(result: TaskResult) -> str:
    return f"{result.model['through']}, {result.model['weights']}"


def _dense(result: TaskResult, task: str) -> TaskRow:
    try:
        return result.find(task, "dense", 1.0)
    except KeyError:
        raise DataError(f"{_name(result)} has no dense row of {task}") from None


def main(arguments: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="outputs of vesicle eval")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON")
    options = parser.parse_args(arguments)
    try:
        found = compare([TaskResult.load(folder / "result.json") for folder in options.folders])
        if options.out:
            write_json(options.out, found)
    except VesicleError as error:
        print(f"agreement: error: {error}", file=sys.stderr)
        return 2
    print("executors:", "; ".join(found["executors"]))
    for task in found["tasks"]:
        for metric in task["metrics"].values():
            values = "  ".join(f"{v:8.3f}" for v in metric["values"])
            verdict = "agree" if metric["agrees"] else "DIFFER"
            counts = ", ".join(map(str, metric["items_that_differ"]))
            print(f"{task['name']:16} {metric['title']:32} {values}  items: {counts}  {verdict}")
    return 0 if found["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())

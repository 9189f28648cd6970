"""Reading results of `vesicle regret` of before it wrote what `vesicle eval` writes.

A row was one method at one budget on `all` windows or on the `oracle`'s, and had the mean loss of
each window. Of costs it had the share of the FLOPs alone, and no bytes of each window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.errors import DataError
from vesicle.evaluation.report.results import ORACLE_PART, TEXT, Score, TaskResult, TaskRow
from vesicle.evaluation.report.rows import facts_of, score_of
from vesicle.files import read_json
from vesicle.tasks.metrics.likelihood import BitsPerByte, Loss

SCHEMA = "vesicle-evaluation-1"
_PARTS = {"all": (TEXT, "All windows"), "oracle": (TEXT + ORACLE_PART, "The oracle's windows")}


def load_result(path: Path | str) -> TaskResult:
    """Read a record of this or of the old form.

    Raises:
        DataError: The file is missing, malformed or of another schema.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        return TaskResult.from_dict(values)
    try:
        return _converted(values)
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no whole {SCHEMA} record: {error!r}") from error


def _converted(values: dict[str, Any]) -> TaskResult:
    given = {row["subset"]: row for row in reversed(values["rows"])}
    precision = values["config"]["dtype"]
    common = ("config", "config_hash", "seed", "versions", "hardware", "modulator")
    return TaskResult(
        **{name: values[name] for name in common},
        model={**values["model"], "through": "reference", "weights": precision, "kv": precision},
        tasks=[_facts(values, subset, given[subset]) for subset in _PARTS if subset in given],
        rows=[_row(values, row) for row in values["rows"]],
        missing=[
            {**{k: v for k, v in m.items() if k != "subset"}, "task": _PARTS[m["subset"]][0]}
            for m in values["missing"]
        ],
    )


def _facts(values: dict[str, Any], subset: str, row: dict[str, Any]) -> dict[str, Any]:
    name, title = _PARTS[subset]
    return {
        "name": name,
        "title": title,
        "kind": "loss",
        "style": "plain",
        "split": values["config"]["split"],
        "data": values["data"]["description"],
        "sha256": values["data"]["sha256"],
        "n_items": row["n_windows"],
        "n_rows": 0,
        "missing": [],
        "prompt_tokens": row["n_tokens"] + row["n_windows"],
        "shortened": 0,
        "metrics": [facts_of(Loss()), facts_of(BitsPerByte())],
    }


def _row(values: dict[str, Any], row: dict[str, Any]) -> TaskRow:
    own, subset, budget = _records(row), row["subset"], row["budget"]

    def beside(method: str, budget: float) -> dict[str, Any] | None:
        for other in values["rows"]:
            if (other["method"], other["subset"], other["budget"]) == (method, subset, budget):
                return other
        return None

    dense = beside("dense", 1.0)
    learnt = None if row["method"] in ("dense", "learnt") else beside("learnt", budget)
    of_dense = own if dense is None else _records(dense)
    of_learnt = None if learnt is None else _records(learnt)
    bits, bits_dense = row["bits_per_byte"], (dense or row)["bits_per_byte"]
    plain = Score(
        value=bits, low=None, high=None, delta=bits - bits_dense, delta_low=None, delta_high=None
    )
    return TaskRow(
        task=_PARTS[subset][0],
        method=row["method"],
        budget=budget,
        n_items=row["n_windows"],
        scores={
            "loss": score_of(Loss(), own, of_dense, of_learnt, values["seed"]),
            "bits_per_byte": plain,
        },
        executed={},
        dense={},
        ratio={"flops": row["cost_share"]},
        measured={"seconds": {"setting": 0.0, "prefill": row["seconds"], "decode": 0.0}},
        items={
            "ids": [*own],
            "statistics": {"loss": [record["statistics"]["loss"] for record in own.values()]},
        },
        details=row["details"],
    )


def _records(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A record a window, as `task_rows` has it; all windows have as many tokens."""
    n = row["n_tokens"] / row["n_windows"]
    return {
        f"window {i}": {"statistics": {"loss": [nats * n, n]}}
        for i, nats in enumerate(row["window_nats"])
    }

"""Results of an earlier run in a folder: part of the new ones, or kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vesicle.errors import DataError
from vesicle.folders import set_aside
from vesicle.records import Record

_SAME = ("seed", "versions", "hardware", "model", "modulator", "data")
_PARTS = ("tasks", "rows")
_MEASURED = ("measured", "seconds")


def keep_earlier(
    result: Record, folder: Path, names: Sequence[str], say: Callable[[str], None]
) -> None:
    """Make room for a result without losing one.

    The earlier one is set aside (see `vesicle.folders`) unless the new one says all that it says,
    as when methods or budgets were added.

    Args:
        result: To be saved next.
        folder: Where.
        names: The file it is saved to, and those that are made from it.
        say: Is told where the earlier one is kept.

    Raises:
        VesicleError: It cannot be kept.
    """
    try:
        before = type(result).load(folder / names[0]).to_dict()
    except DataError:
        before = None  # none, or one that only another version can read
    if before is None or not covers(result.to_dict(), before):
        kept = set_aside(folder, names)
        if kept is not None:
            say(f"the results of an earlier run are kept in {kept}")


def covers(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a record, as JSON, has the facts, tasks and rows of another and perhaps more.

    What is measured, time and memory, may differ: no two runs have the same.
    """
    ours, theirs = (_lasting(json.loads(json.dumps(values))) for values in (new, old))
    return all(ours.get(name) == theirs.get(name) for name in _SAME) and all(
        part in ours[name] for name in _PARTS for part in theirs[name]
    )


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    parts = {
        name: [{k: v for k, v in part.items() if k not in _MEASURED} for part in values[name]]
        for name in _PARTS
        if name in values
    }
    return {**{name: [] for name in _PARTS}, **values, **parts}

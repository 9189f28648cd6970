"""ItemStore: what a run has finished, on disk as it comes, so that it may be killed at any moment.

A line of `items.jsonl` belongs to a hash (of task, data, model and settings), a row and an item;
later lines replace earlier ones. Lines of other hashes stay, for other settings in one folder.
Those of the same base and other code (see `provenance.with_code`) are counted, and not used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vesicle.errors import VesicleError
from vesicle.evaluation.report.results import Key
from vesicle.evaluation.run.lines import JsonLines
from vesicle.evaluation.run.provenance import base_of
from vesicle.files import atomic_path
from vesicle.plan import FloatArray

ITEMS, ROWS, LEVELS = "items.jsonl", "rows.jsonl", "levels"

Place = tuple[str, Key]
"""A row: a hash and its key."""


class ItemStore:
    """Finished items, settings of rows, and released levels of one output folder."""

    file: ClassVar[str] = ITEMS

    def __init__(self, folder: Path, restart: bool = False) -> None:
        """Read what is there.

        Raises:
            VesicleError: The folder cannot be read or made.
        """
        self.folder, self._levels = folder, folder / LEVELS
        self._rows: dict[tuple[str, Key], dict[str, dict[str, Any]]] = {}
        self._missing: dict[tuple[str, Key], dict[str, str]] = {}
        self._settings: dict[tuple[str, Key], dict[str, Any]] = {}
        self._lines = JsonLines(folder / self.file, restart=restart)
        if restart:
            shutil.rmtree(self._levels, ignore_errors=True)
        for values in self._lines.found:
            try:
                self._keep(values)
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # not a whole line: its item is run again

    def has(self, hash_: str, key: Key, item: str) -> bool:
        """Whether an item is done."""
        return item in self._rows.get((hash_, key), {})

    def count(self, hash_: str, key: Key) -> int:
        """Items of a row that are done."""
        return len(self._rows.get((hash_, key), {}))

    def get(self, hash_: str, key: Key, item: str) -> dict[str, Any]:
        """A finished item's record.

        Raises:
            KeyError: If it is not done.
        """
        return self._rows[(hash_, key)][item]

    def count_by_other_code(self, hash_: str, key: Key) -> int:
        """Items of a row that are done by other code alone."""
        base = base_of(hash_)
        done = self._rows.get((hash_, key), {}).keys()
        others = [
            items.keys()
            for (other, place), items in self._rows.items()
            if place == key and other != hash_ and base_of(other) == base
        ]
        return len(set().union(*others) - done)

    def missing(self, hash_: str, key: Key) -> dict[str, str]:
        """Why items of a row could not be run, the last time it was tried."""
        return dict(self._missing.get((hash_, key), {}))

    def settings(self, hash_: str, key: Key) -> dict[str, Any] | None:
        """What a row's method was set to; None if it never got so far."""
        return self._settings.get((hash_, key))

    def add(self, hash_: str, key: Key, item: str, record: dict[str, Any]) -> None:
        """Store a finished item's record, in place of an earlier one or of why it was missing."""
        self._write({"hash": hash_, "key": list(key), "item": item, "record": record})

    def add_missing(self, hash_: str, key: Key, item: str, reason: str) -> None:
        """Store why an item could not be run."""
        if self.missing(hash_, key).get(item) != reason:
            self._write({"hash": hash_, "key": list(key), "item": item, "missing": reason})

    def add_settings(self, hash_: str, key: Key, settings: dict[str, Any]) -> None:
        """Store what a row's method was set to."""
        self._write({"hash": hash_, "key": list(key), "settings": settings})

    def forget(self, hash_: str, key: Key) -> None:
        """Drop a row's items and settings."""
        self._write({"hash": hash_, "key": list(key), "forget": True})

    def has_levels(self, name: str) -> bool:
        """Whether levels of that name are stored."""
        return (self._levels / f"{name}.safetensors").is_file()

    def save_levels(self, name: str, levels: FloatArray) -> None:
        """Store released levels (T, L, 5); they are rounded to six decimals already."""
        from safetensors.numpy import save_file

        with atomic_path(self._levels / f"{name}.safetensors") as part:
            save_file({"levels": levels.astype(np.float32)}, part)

    def levels(self, name: str) -> FloatArray:
        """Stored levels (T, L, 5).

        Raises:
            VesicleError: They cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self._levels / f"{name}.safetensors"
        try:
            return load_file(path)["levels"].astype(np.float64).round(6)
        except (OSError, KeyError, SafetensorError) as error:
            raise VesicleError(
                f"cannot read {path}: {error}; delete it and run the same command again"
            ) from error

    def finish_row(self) -> None:
        """Told where a row has all that can be had."""

    def tally(self, places: Sequence[Place]) -> tuple[str, int, int]:
        """What is counted, how many of these rows are kept, and how many other code has done."""
        kept = sum(self.count(*place) for place in places)
        return "items", kept, sum(self.count_by_other_code(*place) for place in places)

    def progress(self, places: Sequence[Place]) -> str:
        """What an interrupted run may rely on."""
        return "finished items are kept"

    def _keep(self, values: dict[str, Any]) -> None:
        task, method, budget = values["key"]
        place = (values["hash"], (task, method, float(budget)))
        if "forget" in values:
            self._rows.pop(place, None)
            self._missing.pop(place, None)
            self._settings.pop(place, None)
        elif "settings" in values:
            self._settings[place] = values["settings"]
        elif "missing" in values:
            self._missing.setdefault(place, {})[values["item"]] = values["missing"]
            self._rows.get(place, {}).pop(values["item"], None)
        else:
            self._rows.setdefault(place, {})[values["item"]] = values["record"]
            self._missing.get(place, {}).pop(values["item"], None)

    def _write(self, values: dict[str, Any]) -> None:
        self._keep(self._lines.append(values))


class RowStore(ItemStore):
    """The same, with one line a finished row: rows are whole, or run again."""

    file = ROWS

    def __init__(self, folder: Path, restart: bool = False) -> None:
        """Read what is there.

        Raises:
            VesicleError: The folder cannot be read or made.
        """
        self._row: list[dict[str, Any]] = []
        super().__init__(folder, restart)

    def finish_row(self) -> None:
        """Write the row's line."""
        if self._row:
            self._lines.append({"row": self._row})
            self._row = []

    def tally(self, places: Sequence[Place]) -> tuple[str, int, int]:
        """Rows, where `ItemStore` counts items."""
        done = [self.settings(*place) is not None for place in places]
        others = [self.count_by_other_code(*place) > 0 for place in places]
        return (
            f"of {len(places)} rows",
            sum(done),
            sum(other and not own for own, other in zip(done, others, strict=True)),
        )

    def progress(self, places: Sequence[Place]) -> str:
        """How many rows are done."""
        what, done, _ = self.tally(places)
        return f"{done} {what} are done"

    def _keep(self, values: dict[str, Any]) -> None:
        for one in values.get("row", [values]):
            super()._keep(one)

    def _write(self, values: dict[str, Any]) -> None:
        self._keep(json.loads(json.dumps(values, allow_nan=False)))
        self._row.append(values)

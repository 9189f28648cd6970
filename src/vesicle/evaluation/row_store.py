"""RowStore: the finished rows of a text, one line each; a row is had or known to be missing.

Rows of the same settings and other code (see `provenance.with_code`) are named, and not used.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError
from vesicle.evaluation.lines import JsonLines
from vesicle.evaluation.provenance import base_of
from vesicle.evaluation.text_results import Key, Row

ROWS = "rows.jsonl"


class RowStore:
    """Finished rows of one output folder.

    Attributes:
        done: By key: a row, or `method`, `subset`, `budget` and `reason` of one that is missing.
        by_other_code: Keys of rows that other code has done.
    """

    def __init__(self, folder: Path, config_hash: str, *, restart: bool = False) -> None:
        """Read what is there.

        Raises:
            VesicleError: The folder cannot be read or made.
        """
        self._lines, self._hash = JsonLines(folder / ROWS, restart=restart), config_hash
        self.done: dict[Key, Row | dict[str, Any]] = {}
        self.by_other_code: set[Key] = set()
        for values in self._lines.found:
            try:
                if values["config_hash"] == config_hash:
                    self._keep(values)
                elif base_of(values["config_hash"]) == base_of(config_hash):
                    self.by_other_code.add(_key(values.get("row") or values["missing"]))
            except (LookupError, TypeError, AttributeError, VesicleError):
                continue  # not a whole row: it will be computed again

    def row(self, key: Key) -> Row | None:
        """A finished row; None if it is not done, or missing."""
        found = self.done.get(key)
        return found if isinstance(found, Row) else None

    def add(self, row: Row) -> None:
        """Store a row."""
        self._keep(self._lines.append({"config_hash": self._hash, "row": asdict(row)}))

    def add_missing(self, key: Key, reason: str) -> None:
        """Store why a row cannot be had."""
        method, subset, budget = key
        missing = {"method": method, "subset": subset, "budget": budget, "reason": reason}
        self._keep(self._lines.append({"config_hash": self._hash, "missing": missing}))

    def _keep(self, values: dict[str, Any]) -> None:
        found = Row.from_dict(values["row"]) if "row" in values else values["missing"]
        self.done[_key(values.get("row") or values["missing"])] = found


def _key(values: dict[str, Any]) -> Key:
    return (values["method"], values["subset"], values["budget"])

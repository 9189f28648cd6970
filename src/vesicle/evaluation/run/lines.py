"""JsonLines: a file that grows by a line as work is finished, by a process that may be killed.

Lines are appended and flushed to the disk. What a killed process left of its last line is no JSON
and is passed over, and does not swallow the next one.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError


class JsonLines:
    """A file of one JSON value a line; it need not exist.

    Attributes:
        path: Of the file.
        found: The values that were there at first, without lines that are no JSON.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        """Read what is there, or remove it for a `restart`.

        Raises:
            VesicleError: The file cannot be read, or its folder not be made.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if restart:
                path.unlink(missing_ok=True)
            text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise VesicleError(f"cannot use {path.parent}: {error.strerror or error}") from error
        self._torn = bool(text) and not text.endswith("\n")
        self.found: list[Any] = []
        for line in text.split("\n"):
            with suppress(ValueError):
                self.found.append(json.loads(line))

    def append(self, value: dict[str, Any]) -> Any:
        """Write a line and make sure that it is on disk; returns it as a later run would read it.

        Raises:
            VesicleError: The file cannot be written.
        """
        line = json.dumps(value, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise VesicleError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._torn = False
        return json.loads(line)

"""What an analysis has finished: kept in its folder, and never computed again.

Each part is a file, JSON or safetensors, that is written whole or not at all. The folder belongs to
the settings of its first run; a run with others is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_json, write_json


class Finished:
    """The parts of one analysis in a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Take the folder for these settings.

        Args:
            folder: Made if it is missing.
            settings: All that the parts depend on, as JSON can hold it.

        Raises:
            VesicleError: The folder holds another analysis, or cannot be written.
        """
        self.folder = folder
        path = folder / "settings.json"
        ours = json.loads(json.dumps(settings))  # tuples are lists in JSON
        if not path.exists():
            write_json(path, ours)
            return
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise DataError(f"{path} does not hold settings")
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise VesicleError(
                    f"{folder} holds an analysis whose {name} is {_short(theirs.get(name))}, not "
                    f"{_short(ours.get(name))}: use another folder, or remove it"
                )

    def values(self, name: str, make: Callable[[], Any]) -> Any:
        """A part that JSON can hold: read if it is there, else made and kept.

        Args:
            name: Of the file, without its suffix; folders are made.
            make: Gives it.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, make(), indent=None)
        return read_json(path)

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A part of tensors by name: likewise.

        Raises:
            DataError: The file is not whole.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            made = {key: value.contiguous() for key, value in make().items()}
            with atomic_path(path) as part:
                save_file(made, part)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}; remove it") from error


def file_name(text: str) -> str:
    """A text as a file's name, another one for every text; blanks are underscores."""
    return quote(text, safe=" ").replace("_", "%5F").replace(" ", "_")


def _short(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) <= 60 else told[:57] + "..."

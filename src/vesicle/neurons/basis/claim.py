"""A study's folder belongs to its settings: another study there is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError
from vesicle.files import read_json, write_json


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Have the folder for these settings.

    Args:
        folder: Made if it is missing.
        settings: What JSON can hold.

    Raises:
        VesicleError: It has others, or cannot be written.
    """
    path = folder / "settings.json"
    ours = json.loads(json.dumps(settings))  # as JSON has them: tuples are lists there
    if not path.exists():
        write_json(path, ours)
        return
    theirs = read_json(path)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise VesicleError(
                f"{folder} holds a study with another {name}: use another folder, or remove it"
            )

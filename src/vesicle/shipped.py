"""The modulators that come inside the package: which one fits, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import VesicleError
from vesicle.files import cache_root
from vesicle.models.default import DEFAULT_MODEL

if TYPE_CHECKING:
    from vesicle.modulator import Modulator

FOLDER = Path(__file__).parent / "modulators"


def shipped_modulator() -> Path | None:
    """The folder of the default model's modulator, or None if this package ships none."""
    found = sorted(path.parent for path in FOLDER.glob("*/modulator.json"))
    named = [folder for folder in found if folder.name == DEFAULT_MODEL]
    return next(iter(named + found), None)


def is_default_model(folder: Path) -> bool:
    """Whether `folder`, from `resolve_model`, is the model that shipped modulators fit."""
    return folder.resolve() == (cache_root() / "models" / DEFAULT_MODEL).resolve()


def load_default_modulator() -> Modulator:
    """The modulator that ships with the package, for the default model.

    Raises:
        VesicleError: If this package ships none.
    """
    folder = shipped_modulator()
    if folder is None:
        raise VesicleError("no modulator is shipped with this package; train one: vesicle train")
    from vesicle.modulator import Modulator

    return Modulator.from_pretrained(folder)

"""What comes inside the package for the default model: a modulator, and a NAMM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import VesicleError
from vesicle.files import cache_root
from vesicle.models.default import DEFAULT_MODEL

if TYPE_CHECKING:
    from vesicle.modulator import Modulator

FOLDER = Path(__file__).parent / "modulators"
NAMMS = Path(__file__).parent / "namms"


def shipped_modulator() -> Path | None:
    """The folder of the default model's modulator, or None if this package ships none."""
    found = sorted(path.parent for path in FOLDER.glob("*/modulator.json"))
    named = [folder for folder in found if folder.name == DEFAULT_MODEL]
    return next(iter(named + found), None)


def shipped_namm() -> Path | None:
    """The folder of the default model's NAMM, or None if this package ships none."""
    return shipped_namms().get(DEFAULT_MODEL)


def shipped_namms() -> dict[str, Path]:
    """Folders of all NAMMs that this package ships, by the names of the models they are for."""
    return {path.parent.name: path.parent for path in sorted(NAMMS.glob("*/namm.json"))}


def is_default_model(folder: Path) -> bool:
    """Whether `folder`, from `resolve_model`, is the model that what is shipped fits."""
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

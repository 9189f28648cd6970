"""What comes inside the package for models of the catalogue: modulators, and NAMMs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import VesicleError
from vesicle.files import cache_root
from vesicle.models.catalogue import CATALOGUE, DEFAULT_MODEL

if TYPE_CHECKING:
    from vesicle.modulator import Modulator

MODULATORS = Path(__file__).parent / "modulators"
NAMMS = Path(__file__).parent / "namms"


def shipped_modulators() -> dict[str, Path]:
    """Folders of all modulators that this package ships, by the models they are for."""
    return _by_model(MODULATORS, "modulator.json")


def shipped_namms() -> dict[str, Path]:
    """Folders of all NAMMs that this package ships, by the models they are for."""
    return _by_model(NAMMS, "namm.json")


def modulator_for(folder: Path) -> Path | None:
    """The shipped modulator of a model, by its folder from `resolve_model`; None for none."""
    return shipped_modulators().get(name_of(folder))


def namm_for(folder: Path) -> Path | None:
    """The shipped NAMM of a model, by its folder from `resolve_model`; None for none."""
    return shipped_namms().get(name_of(folder))


def name_of(folder: Path) -> str:
    """What the catalogue calls the model in `folder`; empty for a model of other origin."""
    known = {(cache_root() / "models" / name).resolve(): name for name in CATALOGUE}
    return known.get(folder.resolve(), "")


def shipped_modulator() -> Path | None:
    """The folder of the default model's modulator, or None if this package ships none."""
    return shipped_modulators().get(DEFAULT_MODEL)


def shipped_namm() -> Path | None:
    """The folder of the default model's NAMM, or None if this package ships none."""
    return shipped_namms().get(DEFAULT_MODEL)


def load_default_modulator(model: str | None = None) -> Modulator:
    """The modulator that ships with the package for a model.

    Args:
        model: Its name in the catalogue; the default model's by default.

    Raises:
        VesicleError: If this package ships none for it.
    """
    name = model or DEFAULT_MODEL
    folder = shipped_modulators().get(name)
    if folder is None:
        raise VesicleError(
            f"no modulator is shipped for {name}; train one with vesicle train, or name one of: "
            f"{', '.join(shipped_modulators())}"
        )
    from vesicle.modulator import Modulator

    return Modulator.from_pretrained(folder)


def _by_model(folder: Path, file: str) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{file}"))}

"""Checks what lm_eval passes on from a person: model arguments, whose types it guesses."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from vesicle.errors import VesicleError
from vesicle.modulator import Modulator
from vesicle.shipped import modulator_for

SHIPPED = "shipped"
_AUTO_BATCH = 8
_MOST_BATCH = 256

logger = logging.getLogger("lm_eval.vesicle")  # so that lm_eval's settings hold for it


def unknown(kind: str, name: str, known: Sequence[str]) -> VesicleError:
    """An error for an argument that nobody knows."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return VesicleError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(known)}")


def number(name: str, value: object) -> float:
    """A value that must be a number.

    Raises:
        VesicleError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise VesicleError(f"{name} is {value!r}; allowed: a number")
    return float(value)


def whole(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """A value that must be a whole number from `least` to `most`.

    Raises:
        VesicleError: It is none.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        allowed = f"{least} and above" if most is None else f"{least} to {most}"
        raise VesicleError(f"{name} is {value!r}; allowed: whole numbers, {allowed}")
    return value


def whole_batch(value: int | str | None) -> int:
    """Texts side by side; lm_eval's `auto` and `auto:N` leave it to us.

    Raises:
        VesicleError: It is neither that nor a whole number that is allowed.
    """
    if value is None:
        return 1
    if isinstance(value, str) and value.split(":")[0] == "auto":
        return _AUTO_BATCH
    read = int(value) if isinstance(value, str) and value.isdecimal() else value
    return whole("batch_size", read, most=_MOST_BATCH)


def stored_format(value: str | None) -> str | None:
    """A format's name, None for `auto`."""
    return None if value in (None, "auto") else str(value)


def find_modulator(
    spec: str | None, folder: Path, budget: float | None
) -> tuple[Modulator | None, str]:
    """The modulator that `spec` means, None for a dense run; and what to call it.

    Args:
        spec: As `VesicleLM` has it.
        folder: Of the model.
        budget: What was asked for.

    Raises:
        VesicleError: A budget below 1 needs one, and there is none.
        ModelError: It cannot be found or read.
    """
    if spec is None or str(spec).lower() == "none":
        if budget is not None and budget != 1:
            raise VesicleError(f"budget is {budget}; without a modulator only 1 is allowed")
        return None, "none"
    if spec != SHIPPED:
        return Modulator.from_pretrained(str(spec)), str(spec)
    shipped = modulator_for(folder)
    if shipped is not None:
        return Modulator.from_pretrained(shipped), SHIPPED
    if budget is not None and budget != 1:
        raise VesicleError(
            f"budget is {budget}, and no modulator is shipped for this model: name one with "
            "modulator=FOLDER"
        )
    logger.warning("no modulator is shipped for this model, so it runs dense")
    return None, "none"

"""Methods by name: who decides, at equal executed cost.

`dense` is the model itself and `learnt` the modulator. Controls keep the modulator's effectors and
stand-ins and set their levels by a rule (`controls`). The `oracle` searches the levels of a text's
windows with their own labels (`oracle`). A press of kvpress is given as `kvpress:NAME`; its budget
is the share of cached entries that it keeps; so it is with methods that hold a share of the cache
as they go on (`memory`).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from vesicle.errors import VesicleError
from vesicle.evaluation.methods import memory
from vesicle.evaluation.methods.controls import NAMES as CONTROLS
from vesicle.modulator import Modulator
from vesicle.predictors import Predictor
from vesicle.shapes import ModelShape

PRESS = "kvpress:"
ORACLE = "oracle"
ON_ALL_TASKS = ("dense", "learnt", *CONTROLS)
NAMES = (*ON_ALL_TASKS, ORACLE)
ON_A_TEXT = NAMES[1:]
"""Methods of `vesicle regret`, where the dense model is always scored."""
BESIDE_ORACLE = ("learnt", "uniform", "uniform-mix", "per-layer")
"""Methods that are scored on the oracle's windows too, if they are asked for."""


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods in the order in which they are run, without repetitions.

    Raises:
        VesicleError: A name is unknown; near ones are named.
    """
    for name in names:
        if name.startswith(PRESS):
            from vesicle.integrations.kvpress import check_press

            check_press(name.removeprefix(PRESS))
        elif memory.is_namm(name):
            memory.find_namm(name)
        else:
            beyond = f", {memory.NAMM}:FOLDER, and {PRESS}NAME for a press of kvpress"
            check_name(name, (*NAMES, *memory.NAMES), beyond)
    ours = [name for name in NAMES if name in names]
    return (*ours, *dict.fromkeys(name for name in names if name not in NAMES))


def check_name(name: str, known: Sequence[str], beyond: str = "") -> None:
    """Refuse a method that is not known.

    Args:
        name: What was asked for.
        known: What is allowed.
        beyond: What else is, in words.

    Raises:
        VesicleError: Naming near ones.
    """
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise VesicleError(f"unknown method {name!r}{hint}; known: {', '.join(known)}{beyond}")


def saves_memory(name: str) -> bool:
    """Whether what a method saves is memory, and not FLOPs; its budget is a share of the cache."""
    return name.startswith(PRESS) or memory.holds_share(name)


def check_trained(modulator: Modulator, shape: ModelShape) -> None:
    """Refuse a modulator under which nothing can be compared.

    Raises:
        ModelError: It was made for another model.
        VesicleError: Its predictor is a control.
    """
    if not isinstance(modulator.predictor, Predictor):
        raise VesicleError(
            f"a {modulator.predictor.kind!r} control is no trained modulator; "
            "controls are built here"
        )
    modulator.check_fits(shape)

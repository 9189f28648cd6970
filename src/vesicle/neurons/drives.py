"""What every neuron contributes to each transmitter's levels, kept as it is found.

`probes.attribute` says how. A transmitter at a time is kept, so that a run that was cut off is gone
on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vesicle.calibration.cache import fingerprint, sample_key
from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.probes import attribute
from vesicle.predictors import Predictor

_FACTS = "drives.json"


@dataclass(frozen=True, kw_only=True)
class Drives:
    """Contributions to levels.

    Attributes:
        drive: By transmitter (L, F), the mean contribution, signed; empty without a modulator.
        size: By transmitter (L, F), its mean magnitude, by which neurons are ranked.
        facts: What they were made of.
    """

    drive: dict[str, Tensor]
    size: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Drives:
        """Read what `find_drives` left.

        Raises:
            DataError: It is not all there, or damaged.
        """
        facts = read_json(folder / _FACTS)
        try:
            found = {name: _read(folder, name) for name in facts["transmitters"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / _FACTS} is not what find_drives wrote: {error}") from error
        return cls(
            drive={name: own["drive"] for name, own in found.items()},
            size={name: own["size"] for name, own in found.items()},
            facts=facts,
        )


def find_drives(
    hooked: Hooked,
    texts: Tensor,
    out: Path,
    *,
    show: Callable[[str, int, str], None] | None = None,
) -> Drives:
    """Attribute the levels of every transmitter that is released.

    Args:
        hooked: A model, with a modulator below rest if there is to be anything.
        texts: (N, T) token ids.
        out: Folder that keeps it.
        show: Told of which transmitter how many texts are done.

    Raises:
        VesicleError: The folder holds those of another model, modulator, budget or text; or as
            `released`.
    """
    from safetensors.torch import save_file

    facts = _facts(hooked, texts)
    if (out / _FACTS).is_file():
        if (theirs := read_json(out / _FACTS)) != facts:
            raise VesicleError(
                f"{out} holds drives of transmitters {theirs.get('transmitters')} at dial "
                f"{theirs.get('dial')}, made with another model, modulator, budget or text: use "
                "another folder, or remove it"
            )
    else:
        write_json(out / _FACTS, facts)
    for name in facts["transmitters"]:
        if (out / f"{name}.safetensors").is_file():
            continue

        def told(done: int, note: str, name: str = name) -> None:
            if show is not None:
                show(name, done, note)

        found = attribute(hooked, name, texts, show=told)
        with atomic_path(out / f"{name}.safetensors") as part:
            save_file({"drive": found.drive, "size": found.size}, part)
    return Drives.load(out)


def released(hooked: Hooked) -> tuple[str, ...]:
    """The transmitters whose levels can be attributed; none where there is no modulator.

    Raises:
        VesicleError: There is one whose levels follow from no activation.
    """
    method = hooked.method
    if not isinstance(method, ModulatorMethod):
        return ()
    if not isinstance(method.modulator.predictor, Predictor):
        raise VesicleError("this modulator reads no hidden states: give another, or none")
    if method.at_rest:
        raise VesicleError("the modulator rests, and its levels follow from nothing: lower budget")
    return tuple(method.modulator.predictor.config.transmitters)


def _facts(hooked: Hooked, texts: Tensor) -> dict[str, Any]:
    method = hooked.method
    dial = modulator = None
    if isinstance(method, ModulatorMethod):
        dial, modulator = method.dial, fingerprint(list(method.modulator.parameters()))
    return {
        "weights": sample_key(hooked.model),
        "texts": fingerprint([texts]),
        "transmitters": list(released(hooked)),
        "dial": dial,
        "modulator": modulator,
    }


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / f"{name}.safetensors"
    try:
        found = load_file(file)
        return {part: found[part] for part in ("drive", "size")}
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error

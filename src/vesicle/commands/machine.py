"""What the engine finds on this machine: native core, instruction set, threads, GPU."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from vesicle.commands.inputs import notice

if TYPE_CHECKING:
    from vesicle.engine import Engine


def announce_core() -> None:
    """Load native code; where some is missing or limited, say so in a line, and go on."""
    for line in _load_core():
        notice(line)


def announce_fallback(engine: Engine) -> None:
    """Say in one line if the native core is there, and not for this model."""
    from vesicle.engine import core

    if core.available() and engine.uncovered is not None:
        notice(f"the model runs in PyTorch, slower: {engine.uncovered}")


def machine_rows() -> list[tuple[str, str]]:
    """Names and values, to show."""
    import torch

    from vesicle.bench.machine import hardware
    from vesicle.engine import core
    from vesicle.processors import allowed
    from vesicle.report import scaled

    _load_core()  # a row says what it found
    found = hardware()
    memory = found["memory_bytes"]
    size = "" if memory is None else f", {scaled(memory, 'B')} of memory"
    name = core.instructions()
    missing = f"PyTorch alone: {core.fallback()}"
    engine = missing if name is None else f"native core, {name} instructions"
    return [
        ("engine", engine),
        ("threads", f"{torch.get_num_threads()}; usable cores: {len(allowed())}"),
        ("processor", f"{found['cpu']}{size}"),
        ("flags", " ".join(found["flags"]) or "none that the kernels use"),
        ("GPU", _gpu()),
    ]


def _load_core() -> list[str]:
    """What there is to say about native code.

    An instruction set that is not there is told once, when the core is loaded.
    """
    from vesicle.engine import core

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        core.load()
    if (line := core.fallback()) is not None:
        return [line]
    return [str(w.message) for w in caught if core.INSTRUCTIONS in str(w.message)]


def _gpu() -> str:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver: then there is none to use
        if not torch.cuda.is_available():
            return "none"
        return torch.cuda.get_device_name()

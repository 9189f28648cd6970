"""What the engine finds on this machine: native core, instruction set, threads, GPU."""

from __future__ import annotations

import os
import warnings

from vesicle.commands.inputs import notice


def announce_core() -> None:
    """Load the native core; where it is missing or limited, say so in one line, and go on."""
    for line in _load_core():
        notice(line)


def machine_rows() -> list[tuple[str, str]]:
    """Names and values, to show."""
    import torch

    from vesicle.bench.machine import hardware, usable_cores
    from vesicle.engine import core
    from vesicle.report import scaled

    _load_core()  # a row says what it found
    found = hardware()
    memory = found["memory_bytes"]
    size = "" if memory is None else f", {scaled(memory, 'B')} of memory"
    name = core.instructions()
    if name is not None:
        engine = f"native core, {name} instructions"
    elif os.environ.get(core.DISABLE) == "1":
        engine = f"PyTorch alone: {core.DISABLE} is 1"
    else:
        engine = "PyTorch alone: the native core is missing"
    return [
        ("engine", engine),
        ("threads", f"{torch.get_num_threads()}; usable cores: {len(usable_cores())}"),
        ("processor", f"{found['cpu']}{size}"),
        ("flags", " ".join(found["flags"]) or "none that the kernels use"),
        ("GPU", _gpu()),
    ]


def _load_core() -> list[str]:
    """What the core has to say when it is loaded, which happens once: it does not warn again."""
    from vesicle.engine import core

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        core.load()
    return [str(warning.message) for warning in caught]


def _gpu() -> str:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver: then there is none to use
        if not torch.cuda.is_available():
            return "none"
        return torch.cuda.get_device_name()

"""Methods that hold a share of the cache, whose budget is that share; everything else is at rest.

- `namm`, or `namm:FOLDER`: a NAMM, the shipped one by default.
- `recency`: the first and the newest entries (StreamingLLM, Xiao et al. 2023).
- `heavy-hitters`: the newest, and those that have received most attention (H2O, Zhang et al. 2023).

They forget as a text is read and written. That is not to be confused with presses, which compress a
context once, when all of it and nothing else was read.
"""

from __future__ import annotations

from pathlib import Path

from vesicle.errors import VesicleError
from vesicle.eviction import HeavyHitters
from vesicle.namm import Namm, NammMemory
from vesicle.plan import BLOCK, Method
from vesicle.shipped import shipped_namm

NAMM, RECENCY, HEAVY = "namm", "recency", "heavy-hitters"
NAMES = (NAMM, RECENCY, HEAVY)


def holds_share(name: str) -> bool:
    """Whether a method is one of these."""
    return name in NAMES or is_namm(name)


def is_namm(name: str) -> bool:
    """Whether a method is a NAMM, the shipped one or another."""
    return name.partition(":")[0] == NAMM


def memory_method(name: str, share: float, n_tokens: int) -> Method:
    """The method for a prompt of `n_tokens`.

    Raises:
        VesicleError: If there is no such NAMM.
    """
    if name == RECENCY:
        return NammMemory(Namm.fresh(), memory=share)
    if name == HEAVY:
        return HeavyHitters(max(2 * BLOCK, round(share * n_tokens)), interval=128)
    return NammMemory(find_namm(name), memory=share)


def find_namm(name: str) -> Namm:
    """The NAMM of a method `namm` or `namm:FOLDER`.

    Raises:
        VesicleError: If there is none, or it cannot be read.
    """
    folder = name.removeprefix(NAMM).removeprefix(":")
    found = Path(folder) if folder else shipped_namm()
    if found is None:
        raise VesicleError("no NAMM is shipped with this package; make one: vesicle evolve")
    return Namm.load(found)

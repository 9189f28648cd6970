"""Methods that hold or read a share of the cache, which their budget is; all else is at rest.

- `namm`, or `namm:FOLDER`: a NAMM, the shipped one by default.
- `recency`: the first and the newest entries (StreamingLLM, Xiao et al. 2023).
- `heavy-hitters`: the newest, and those that have received most attention (H2O, Zhang et al. 2023).
- `reading`: holds everything, and reads a fixed number of entries, that share of the prompt's.
- `namm-protected`, `namm-protected:FOLDER` and `recency-protected`: the same, and an item's
  preamble (the rules of `instructions`) stays whatever else is forgotten, within the same share.

They forget as a text is read and written. That is not to be confused with presses, which compress a
context once, when all of it and nothing else was read.
"""

from __future__ import annotations

from pathlib import Path

from vesicle.errors import VesicleError
from vesicle.eviction import HeavyHitters
from vesicle.namm import Namm, NammMemory
from vesicle.plan import BLOCK, Method
from vesicle.reading import LEAST_TOKENS, Reading
from vesicle.shapes import ModelShape
from vesicle.shipped import shipped_namm

NAMM, RECENCY, HEAVY, READING = "namm", "recency", "heavy-hitters", "reading"
PROTECTED = "-protected"
NAMES = (NAMM, RECENCY, HEAVY, READING, NAMM + PROTECTED, RECENCY + PROTECTED)


def holds_share(name: str) -> bool:
    """Whether a method is one of these."""
    return name in NAMES or is_namm(name)


def is_namm(name: str) -> bool:
    """Whether a method is a NAMM, the shipped one or another."""
    return name.partition(":")[0].removesuffix(PROTECTED) == NAMM


def memory_method(name: str, share: float, n_tokens: int, n_preamble: int = 0) -> Method:
    """The method for a prompt of `n_tokens`, the first `n_preamble` of which are instructions.

    Raises:
        VesicleError: If there is no such NAMM.
    """
    if name == HEAVY:
        return HeavyHitters(max(2 * BLOCK, round(share * n_tokens)), interval=128)
    kind = name.partition(":")[0]
    spans = [(0, n_preamble)] if kind.endswith(PROTECTED) and n_preamble else []
    namm = find_namm(name) if is_namm(name) else Namm.fresh()
    return NammMemory(namm, memory=share, protects=spans)


def reading_method(share: float, n_tokens: int, shape: ModelShape) -> Method:
    """Reads a share of a prompt of `n_tokens`, dealt out as the shipped NAMM's profile says.

    Of a model that it does not fit all heads read alike.
    """
    source = shipped_namm()
    profile = None if source is None else Namm.load(source).profile
    if profile is not None and profile.shape != (shape.n_layers, shape.n_kv_heads):
        profile = None
    return Reading(max(LEAST_TOKENS, round(share * n_tokens)), shape, profile=profile)


def find_namm(name: str) -> Namm:
    """The NAMM of a method such as `namm` or `namm:FOLDER`.

    Raises:
        VesicleError: If there is none, or it cannot be read.
    """
    folder = name.partition(":")[2]
    found = Path(folder) if folder else shipped_namm()
    if found is None:
        raise VesicleError("no NAMM is shipped with this package; make one: vesicle evolve")
    return Namm.load(found)

"""The five transmitters: what each one sets, which way is up, and where it rests.

A *level* is continuous in [0, 1]; 1 is the resting level, at which the effector is an exact no-op
and the model computes what it always did. Lower levels spend less. Levels are released once per
token and layer, after the layer's self-attention, and govern that layer's feed-forward network
(FFN) and the *next* layer's attention; the first attention layer therefore always rests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Transmitter:
    """One transmitter.

    Attributes:
        name: Lower-case name, as used in files and reports.
        sets: The kind of compute that its level governs.
        low: What happens as the level falls below rest.
    """

    name: str
    sets: str
    low: str


TRANSMITTERS: dict[str, Transmitter] = {
    "dopamine": Transmitter(
        name="dopamine",
        sets="numeric precision: input channels read per projection, and weight bits",
        low="fewer input channels, then fewer weight bits",
    ),
    "serotonin": Transmitter(
        name="serotonin",
        sets="depth: which module each FFN runs, and whether attention runs",
        low="a small stand-in instead of the FFN, then of the attention layer too",
    ),
    "gaba": Transmitter(
        name="gaba",
        sets="attention sparsity: key-value blocks that a query reads",
        low="fewer blocks",
    ),
    "acetylcholine": Transmitter(
        name="acetylcholine",
        sets="attention granularity: tile size over keys and values",
        low="coarser tiles",
    ),
    "noradrenaline": Transmitter(
        name="noradrenaline",
        sets="memory: key-value entries kept",
        low="fewer entries",
    ),
}
"""All five, in the order of the last axis of every array of levels (T, L, 5)."""

NAMES: tuple[str, ...] = tuple(TRANSMITTERS)
REST = 1.0


def index(name: str) -> int:
    """The position of a transmitter on the last axis of levels.

    Raises:
        ValueError: If `name` is not one of the five.
    """
    if name not in TRANSMITTERS:
        raise ValueError(f"unknown transmitter {name!r}; known: {', '.join(NAMES)}")
    return NAMES.index(name)

"""Attention patterns for small decoders: tiles, and what they are measured against. One a file."""

from __future__ import annotations

from vesicle.scratch.patterns.base import Dense, Pattern, patterned
from vesicle.scratch.patterns.linear import Linear
from vesicle.scratch.patterns.lsh import Lsh
from vesicle.scratch.patterns.selected import Selected
from vesicle.scratch.patterns.sliding import Sliding
from vesicle.scratch.patterns.strided import Strided
from vesicle.scratch.patterns.tiles import Tiles, TilesState

__all__ = [
    "Dense",
    "Linear",
    "Lsh",
    "Pattern",
    "Selected",
    "Sliding",
    "Strided",
    "Tiles",
    "TilesState",
    "patterned",
]

"""The engine: executes Plans by really skipping work."""

from __future__ import annotations

from vesicle.engine.engine import Engine
from vesicle.engine.generation import Generation
from vesicle.engine.sampling import Sampling
from vesicle.engine.sequence import Sequence

__all__ = ["Engine", "Generation", "Sampling", "Sequence"]

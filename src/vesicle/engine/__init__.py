"""The engine: executes Plans by really skipping work."""

from __future__ import annotations

from vesicle.engine.engine import Engine, Sequence
from vesicle.engine.generation import Generation
from vesicle.engine.sampling import Sampling

__all__ = ["Engine", "Generation", "Sampling", "Sequence"]

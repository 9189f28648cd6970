"""Evolving what no gradient reaches: which entries of the cache a NAMM keeps."""

from vesicle.evolution.config import EvolveConfig
from vesicle.evolution.evolve import Evolved, evolve
from vesicle.evolution.questions import Question

__all__ = ["EvolveConfig", "Evolved", "Question", "evolve"]

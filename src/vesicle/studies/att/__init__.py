"""The study of Adaptive Tensor Tiling: the ten steps of its proposal, by one command."""

from vesicle.studies.att.plan import run_study
from vesicle.studies.att.scale import SCALES, Scale

__all__ = ["SCALES", "Scale", "run_study"]

"""The study of neurotransmitter-inspired inference: baselines, ablations, analysis, scaling."""

from vesicle.studies.neuro.plan import run_study
from vesicle.studies.neuro.scale import SCALES, Scale

__all__ = ["SCALES", "Scale", "run_study"]

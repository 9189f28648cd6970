"""The study of Duo-LLM (Alizadeh et al. 2024): its claims beside their controls, by one command."""

from vesicle.studies.duo.plan import run_study
from vesicle.studies.duo.scale import SCALES, Scale

__all__ = ["SCALES", "Scale", "run_study"]

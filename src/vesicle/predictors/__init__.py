"""Predictors: trained ones, and the controls that they must beat."""

from __future__ import annotations

from vesicle.predictors.base import Levels, Predictor, PredictorConfig, State
from vesicle.predictors.fixed import (
    ConstantLevels,
    RandomLevels,
    ReplayLevels,
    ShuffledLevels,
    spread_seed,
)
from vesicle.predictors.linear import LinearPredictor
from vesicle.predictors.mlp import MlpPredictor
from vesicle.predictors.recurrent import RecurrentPredictor

PREDICTORS: dict[str, type[Predictor]] = {
    "linear": LinearPredictor,
    "mlp": MlpPredictor,
    "recurrent": RecurrentPredictor,
}
CONTROLS: dict[str, type[Levels]] = {
    "constant": ConstantLevels,
    "random": RandomLevels,
    "shuffled": ShuffledLevels,
    "replay": ReplayLevels,
}

__all__ = [
    "CONTROLS",
    "PREDICTORS",
    "ConstantLevels",
    "Levels",
    "MlpPredictor",
    "Predictor",
    "PredictorConfig",
    "RandomLevels",
    "ReplayLevels",
    "ShuffledLevels",
    "State",
    "spread_seed",
]

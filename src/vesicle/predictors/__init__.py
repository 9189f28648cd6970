"""Predictors: trained ones, and the controls that they must beat."""

from __future__ import annotations

from vesicle.predictors.adaptive_computation_time import AdaptiveComputationTime
from vesicle.predictors.base import Levels, Predictor, PredictorConfig, State
from vesicle.predictors.delays import DelaysPredictor
from vesicle.predictors.dendrites import DendritesPredictor
from vesicle.predictors.early_exit import EarlyExit
from vesicle.predictors.fixed import (
    ConstantLevels,
    RandomLevels,
    ReplayLevels,
    ShuffledLevels,
    spread_seed,
)
from vesicle.predictors.gain import GainPredictor
from vesicle.predictors.linear import LinearPredictor
from vesicle.predictors.mixture_of_depths import MixtureOfDepths
from vesicle.predictors.mlp import MlpPredictor
from vesicle.predictors.pooled import PooledPredictor
from vesicle.predictors.quadratic import QuadraticPredictor
from vesicle.predictors.recurrent import RecurrentPredictor

PREDICTORS: dict[str, type[Predictor]] = {
    "linear": LinearPredictor,
    "mlp": MlpPredictor,
    "recurrent": RecurrentPredictor,
    "quadratic": QuadraticPredictor,
    "dendrites": DendritesPredictor,
    "delays": DelaysPredictor,
    "gain": GainPredictor,
    "pooled": PooledPredictor,
}
BASELINES: dict[str, type[Predictor]] = {
    "act": AdaptiveComputationTime,
    "calm": EarlyExit,
    "mod": MixtureOfDepths,
}
"""Published ways to spend less, as predictors that release serotonin alone."""

TRAINED = PREDICTORS | BASELINES
"""All that a modulator can have."""

CONTROLS: dict[str, type[Levels]] = {
    "constant": ConstantLevels,
    "random": RandomLevels,
    "shuffled": ShuffledLevels,
    "replay": ReplayLevels,
}

__all__ = [
    "BASELINES",
    "CONTROLS",
    "PREDICTORS",
    "TRAINED",
    "AdaptiveComputationTime",
    "ConstantLevels",
    "DelaysPredictor",
    "DendritesPredictor",
    "EarlyExit",
    "GainPredictor",
    "Levels",
    "MixtureOfDepths",
    "MlpPredictor",
    "PooledPredictor",
    "Predictor",
    "PredictorConfig",
    "QuadraticPredictor",
    "RandomLevels",
    "ReplayLevels",
    "ShuffledLevels",
    "State",
    "spread_seed",
]

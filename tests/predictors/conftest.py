"""Predictors by which tokens stop early."""

import pytest
import torch

from tests.predictors.test_adaptive_computation_time import CONFIG
from tests.tiny import perturb
from vesicle.predictors import AdaptiveComputationTime, EarlyExit


@pytest.fixture
def act() -> AdaptiveComputationTime:
    """Halts about half of the tokens on the way."""
    predictor = AdaptiveComputationTime(CONFIG)
    perturb(predictor)
    with torch.no_grad():
        predictor.offset += 2.5
    return predictor.double().eval()


@pytest.fixture
def calm() -> EarlyExit:
    predictor = EarlyExit(CONFIG)
    perturb(predictor)
    return predictor.double().eval()

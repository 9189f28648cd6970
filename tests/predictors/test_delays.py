"""Learnt delays: what the filters are, how far they reach, and pruning."""

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_predictor
from vesicle.predictors import DelaysPredictor, PredictorConfig
from vesicle.predictors.delays import TAPS

D, M = 48, 6


def features(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, D, generator=generator, dtype=torch.float64)


def trained() -> DelaysPredictor:
    predictor = tiny_predictor("delays")
    assert isinstance(predictor, DelaysPredictor)
    return predictor


def test_delays_start_apart_and_over_the_whole_range():
    config = PredictorConfig(n_layers=2, width=8, transmitters=("gaba",), hidden=16)
    for layer in range(2):
        delays = DelaysPredictor(config).delays(layer).flatten().sort().values
        assert ((delays > 0) & (delays < TAPS - 1)).all()
        step = (TAPS - 1) / 32
        torch.testing.assert_close(delays.diff(), torch.full((31,), step), rtol=0, atol=1e-5)


def test_the_equation():
    predictor, x = trained(), features(40)
    u = x @ predictor.inner[1].T
    delays, taps = predictor.delays(1), predictor.taps(1)
    filtered = torch.zeros_like(u)
    for k in range(TAPS):
        gaussians = torch.exp(-((k - delays) ** 2) / 2)
        weight = (predictor.height[1] * gaussians).sum(dim=-1)
        torch.testing.assert_close(taps[:, k], weight)
        filtered[:, k:] += weight * u[:, : 40 - k]
    expected = filtered.tanh() @ predictor.outer[1].T
    torch.testing.assert_close(predictor.drive(1, x, {}), expected, rtol=0, atol=1e-12)


def test_a_token_is_heard_for_as_long_as_there_are_taps():
    predictor, x = trained(), features(40)
    other = x.clone()
    other[:, 3] = features(40, 1)[:, 3]
    moved = (predictor.drive(0, x, {}) != predictor.drive(0, other, {})).any(dim=-1).all(dim=0)
    assert moved.nonzero().flatten().tolist() == list(range(3, 3 + TAPS))


def test_a_delay_learns_when_to_listen():
    """From five tokens to seven, by gradients alone."""
    config = PredictorConfig(n_layers=1, width=1, transmitters=("gaba",), hidden=1)
    predictor = DelaysPredictor(config)
    with torch.no_grad():
        predictor.height.copy_(torch.tensor([1.0, 0.0]))
        predictor.place[0, 0, 0] = torch.tensor(5 / (TAPS - 1)).logit()
    wanted = torch.exp(-((torch.arange(TAPS) - 7) ** 2) / 2)
    for _ in range(100):
        error = (predictor.taps(0)[0] - wanted).square().sum()
        (slope,) = torch.autograd.grad(error, predictor.place)
        with torch.no_grad():
            predictor.place -= 0.02 * slope
    assert predictor.delays(0)[0, 0].item() == pytest.approx(7, abs=0.05)


@pytest.mark.parametrize("keep", [1, 3, TAPS])
def test_pruned_keeps_the_largest_taps(keep: int):
    predictor, x = trained(), features(30)
    before = predictor.drive(0, x, {})
    small = predictor.pruned(keep)
    for layer in range(3):
        taps, left = predictor.taps(layer), small.taps(layer)
        assert ((left != 0).sum(dim=-1) == keep).all()
        assert torch.equal(left[left != 0], taps[left != 0])
        largest = taps.abs().topk(keep, dim=-1).values
        torch.testing.assert_close(left.abs().topk(keep, dim=-1).values, largest)
    assert torch.equal(predictor.drive(0, x, {}), before)
    assert torch.equal(small.drive(0, x, {}), before) == (keep == TAPS)


def test_what_is_pruned_stays_so():
    small = trained().pruned(2)
    assert torch.equal(small.pruned(TAPS).kept, small.kept)
    other = trained()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other.taps(0), small.taps(0))
    small.drive(0, features(20), {}).square().sum().backward()
    assert (small.place.grad[0] != 0).any()
    with torch.no_grad():
        small.height.add_(1)
    assert (small.taps(0) != 0).sum() == 2 * M


@pytest.mark.parametrize("keep", [0, TAPS + 1])
def test_impossible_pruning_is_refused(keep: int):
    with pytest.raises(ValueError, match=f"keep is {keep}; allowed: 1 to {TAPS}"):
        trained().pruned(keep)

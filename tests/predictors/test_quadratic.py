"""Quadratic neurons: how they start, and what one of them can tell."""

import torch
from torch import Tensor

from tests.tiny import perturb
from vesicle.predictors import PredictorConfig, QuadraticPredictor

D, M = 5, 3
CONFIG = PredictorConfig(n_layers=2, width=D, transmitters=("gaba",), hidden=M)


def features(n: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, n, D, generator=generator, dtype=torch.float64)


def test_neurons_start_as_conventional_ones():
    predictor, x = QuadraticPredictor(CONFIG).double(), features()
    linear = torch.nn.functional.linear(x, predictor.left[1], predictor.left_bias[1])
    assert torch.equal(predictor.neurons(1, x), linear)


def test_the_slow_terms_are_those_that_make_it_quadratic():
    predictor, fresh, x = (
        QuadraticPredictor(CONFIG).double(),
        QuadraticPredictor(CONFIG).double(),
        features(),
    )
    perturb(predictor)
    curved = predictor.neurons(0, x) + predictor.neurons(0, -x) - 2 * predictor.neurons(0, 0 * x)
    assert (curved.abs() > 1e-3).any()
    with torch.no_grad():
        for name in QuadraticPredictor.slow:
            predictor.get_parameter(name).copy_(fresh.get_parameter(name))
    flat = predictor.neurons(0, x) + predictor.neurons(0, -x) - 2 * predictor.neurons(0, 0 * x)
    torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-12)


def test_the_equation():
    predictor, x = QuadraticPredictor(CONFIG).double(), features(7)
    perturb(predictor)
    p = {name: tensor[1] for name, tensor in predictor.named_parameters()}
    for t in range(7):
        h, drive = x[0, t], torch.zeros(1, dtype=torch.float64)
        for m in range(M):
            product = (p["left"][m] @ h + p["left_bias"][m]) * (
                p["right"][m] @ h + p["right_bias"][m]
            )
            q = product + p["square"][m] @ (h * h) + p["square_bias"][m]
            drive = drive + p["outer"][:, m] * q.clamp(min=0)
        torch.testing.assert_close(predictor.drive(1, x, {})[0, t], drive, rtol=0, atol=1e-12)


def test_one_neuron_tells_whether_two_features_agree_in_sign():
    """No conventional neuron does: it is the exclusive or."""
    predictor, x = QuadraticPredictor(CONFIG).double(), features()
    with torch.no_grad():
        for name in ("left", "right"):
            predictor.get_parameter(name).zero_()
        predictor.left[0, 0, 0] = predictor.right[0, 0, 1] = 1
        predictor.right_bias.zero_()
    agree = predictor.neurons(0, x)[..., 0] > 0
    assert torch.equal(agree, (x[..., 0] > 0) == (x[..., 1] > 0))


def test_gradients_reach_the_quadratic_terms_as_soon_as_read_outs_moved():
    predictor = QuadraticPredictor(CONFIG).double()
    predictor.drive(0, features(), {}).sum().backward()
    assert (predictor.outer.grad[0] != 0).any()
    predictor.zero_grad()
    with torch.no_grad():
        predictor.outer.fill_(0.1)
    predictor.drive(0, features(), {}).sum().backward()
    for name in ("left", *QuadraticPredictor.slow):
        assert (predictor.get_parameter(name).grad[0] != 0).any(), name

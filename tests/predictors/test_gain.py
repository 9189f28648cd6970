"""Gain control: responses come back to unit variance after the input's scale has changed."""

import math

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_predictor
from vesicle.predictors import GainPredictor, PredictorConfig

WIDTH, BATCH = 32, 32
FULL, NONE = 40.0, -40.0  # exponents whose gamma is 1 and 0 to machine precision


def passing(tokens: float, exponent: float) -> GainPredictor:
    """Features are the inputs; spreads forget over `tokens`."""
    config = PredictorConfig(n_layers=1, width=WIDTH, transmitters=("gaba",), hidden=WIDTH)
    predictor = GainPredictor(config).double()
    decay = math.exp(-1 / tokens)
    with torch.no_grad():
        predictor.inner[0] = torch.eye(WIDTH)
        predictor.decay.fill_(math.log(decay / (1 - decay)))
        predictor.exponent.fill_(exponent)
    return predictor


def variances(predictor: GainPredictor, *scales: float, each: int = 400) -> Tensor:
    """Of responses over batch and features, by token (T,), as the input's scale steps."""
    generator = torch.Generator().manual_seed(0)
    n = each * len(scales)
    x = torch.randn(BATCH, n, WIDTH, generator=generator, dtype=torch.float64)
    x = x * torch.tensor(scales).repeat_interleave(each)[:, None]
    with torch.no_grad():
        return predictor.responses(0, x, {}).square().mean(dim=(0, 2))


@pytest.mark.parametrize("tokens", [20, 40])
@pytest.mark.parametrize("step", [1 / 8, 8])
def test_variance_returns_to_one_as_fast_as_the_decay_says(step: float, tokens: float):
    variance = variances(passing(tokens, FULL), 1, step)
    assert variance[400] == pytest.approx(step**2, rel=0.15)  # what is new stands out
    # By then exp(-8) = 1 / 2981 of the old spread is left; an average over so few tokens errs,
    # which leaves about 1 / `tokens` too much.
    settled = variance[400 + 8 * int(tokens) :]
    assert settled.mean() == pytest.approx(1 + 1 / tokens, abs=0.03)
    assert settled.min() > 0.85
    assert settled.max() < 1.25


def test_the_slower_decay_takes_longer():
    def within(tokens: float) -> int:
        return int((variances(passing(tokens, FULL), 1, 1 / 8)[400:] > 0.5).nonzero()[0])

    # From 1 to twice 1/64: about 4.2 decay times.
    assert within(20) == pytest.approx(4.2 * 20, rel=0.1)
    assert within(40) == pytest.approx(4.2 * 40, rel=0.1)


def test_gamma_says_how_far_the_gain_follows():
    # A variance of 64 becomes 64^(1 - gamma).
    for exponent, expected in ((NONE, 64), (0.0, 8), (FULL, 1)):
        late = variances(passing(40, exponent), 8, 8)[400:].mean()
        assert late == pytest.approx(expected, rel=0.05)


def test_the_equation():
    predictor = tiny_predictor("gain")
    assert isinstance(predictor, GainPredictor)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 150, 48, generator=generator, dtype=torch.float64)
    u = x @ predictor.inner[1].T
    decay, gamma = predictor.decay[1].sigmoid(), predictor.exponent[1].sigmoid()
    spread, expected = torch.ones_like(u[:, 0]), []
    for t in range(150):
        expected.append(u[:, t] * (spread + 1e-6) ** (-gamma / 2))
        spread = decay * spread + (1 - decay) * u[:, t] ** 2
    state: dict[int, Tensor] = {}
    found = predictor.responses(1, x, state)
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state[1], spread, rtol=1e-10, atol=1e-12)


def test_silence_is_no_division_by_zero():
    predictor = passing(2, FULL)
    x = torch.zeros(1, 200, WIDTH, dtype=torch.float64, requires_grad=True)
    responses = predictor.responses(0, x, {})
    assert (responses == 0).all()
    responses.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters() if p.grad is not None)

"""Sampling: every allowed setting gives a distribution, and no other setting is taken."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vesicle.engine import Sampling
from vesicle.errors import VesicleError

LOGITS = st.lists(
    st.floats(width=32, allow_nan=False) | st.just(-math.inf), min_size=1, max_size=40
)
TEMPERATURES = st.floats(0, 100, exclude_min=True)
TOP_P = st.floats(0, 1, exclude_min=True)


@given(logits=LOGITS, temperature=TEMPERATURES, top_p=TOP_P, seed=st.integers(0, 2**63 - 1))
@example(logits=[1.0, 2.0], temperature=1e-44, top_p=1.0, seed=0)
@example(logits=[1.0, 2.0], temperature=5e-324, top_p=5e-324, seed=0)
@example(logits=[0.0] * 40, temperature=1.0, top_p=1e-300, seed=0)
@example(logits=[math.inf, math.inf, 0.0], temperature=1.0, top_p=0.5, seed=0)
def test_every_setting_gives_a_distribution(
    logits: list[float], temperature: float, top_p: float, seed: int
):
    assume(max(logits) > -math.inf)
    values = torch.tensor(logits)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    chances = sampling.chances(values)
    assert chances.isfinite().all()
    assert (chances >= 0).all()
    assert chances[values == values.max()].max() == chances.max() > 0
    assert chances.sum() >= min(top_p, 1 - 1e-5) - 1e-5
    assert not chances[values == -math.inf].any()
    assert chances[sampling.draw(values, sampling.generator())] > 0


@given(logits=LOGITS)
def test_the_limit_of_small_temperatures_is_greedy(logits: list[float]):
    values = torch.tensor(logits)
    assume(values.max() > -math.inf)
    sampling = Sampling(temperature=5e-324, seed=1)
    drawn = sampling.draw(values, sampling.generator())
    assert values[drawn] == values[Sampling().draw(values, sampling.generator())] == values.max()


@pytest.mark.parametrize("temperature", [0.0, 1e-44, 1.0])
@pytest.mark.parametrize("logits", [[0.0, math.nan], [math.nan], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers(logits: list[float], temperature: float):
    sampling = Sampling(temperature=temperature)
    with pytest.raises(VesicleError, match="logits are no numbers"):
        sampling.draw(torch.tensor(logits), sampling.generator())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -5e-324, 100.1])
def test_temperatures_that_are_refused(value: float):
    with pytest.raises(VesicleError, match=r"^temperature is .*; allowed: 0 to 100$"):
        Sampling(temperature=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 0.0, 1.1])
def test_top_p_that_is_refused(value: float):
    with pytest.raises(VesicleError, match=r"^top-p is .*; allowed: above 0, up to 1$"):
        Sampling(top_p=value)


def test_ordinary_chances_are_those_of_single_precision():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    ordered, tokens = (logits / 0.8).softmax(-1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < 0.9
    expected = torch.zeros_like(logits).scatter(0, tokens[kept], ordered[kept])
    found = Sampling(temperature=0.8, top_p=0.9).chances(logits)
    torch.testing.assert_close(found.float(), expected)


DRAWS = 4000


@pytest.mark.parametrize(("top_p", "moved"), [(1.0, False), (0.8, False), (1.0, True)])
def test_draws_follow_the_chances(top_p: float, moved: bool):
    """Both ways of drawing: from chances, and as the largest of logits that noise has moved."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    sampling = Sampling(temperature=0.7, top_p=top_p, seed=2)
    generator, counts = sampling.generator(), torch.zeros(12, dtype=torch.double)
    for _ in range(DRAWS):
        if moved:
            noise = sampling.noise(12, generator)
            assert noise is not None
            counts[int((logits + noise).argmax())] += 1
        else:
            counts[sampling.draw(logits, generator)] += 1
    chances = sampling.chances(logits)
    chances /= chances.sum()
    spread = (chances * (1 - chances) / DRAWS).sqrt()
    assert ((counts / DRAWS - chances).abs() <= 4.5 * spread).all()


def test_nothing_moves_what_is_greedy():
    sampling = Sampling()
    assert sampling.noise(5, sampling.generator()) is None

"""Intervals: deterministic, paired, and those that a slow bootstrap over items would give."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesicle.tasks.metrics import bootstrap
from vesicle.tasks.metrics.bootstrap import FEWEST, Estimate, interval, paired
from vesicle.tasks.metrics.likelihood import BitsPerByte, Perplexity
from vesicle.tasks.metrics.longbench import DATA_SETS, LongBenchScore
from vesicle.tasks.metrics.squad import F1

NUMBERS = st.lists(st.floats(0, 1), min_size=FEWEST, max_size=40)


def means(numbers) -> np.ndarray:
    """Statistics of a mean."""
    return np.stack([numbers, np.ones(len(numbers))], 1)


def test_the_draws_are_those_of_drawing_items():
    numbers = np.random.default_rng(0).random(30)
    drawn = np.random.default_rng(7).integers(0, 30, (2000, 30))
    low, high = np.quantile(100 * numbers[drawn].mean(1), (0.025, 0.975))
    found = interval(F1(), means(numbers), seed=7)
    assert found.value == pytest.approx(100 * numbers.mean())
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_width_is_that_of_the_normal_approximation_for_many_items():
    numbers = np.random.default_rng(1).random(2000)
    found = interval(F1(), means(numbers))
    half = 1.96 * 100 * numbers.std() / math.sqrt(2000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_about_19_in_20_intervals_hold_the_true_mean():
    rng = np.random.default_rng(2)
    found = [interval(F1(), means(rng.random(60)), draws=400) for _ in range(300)]
    held = np.mean([estimate.low <= 50 <= estimate.high for estimate in found])
    assert 0.91 <= held <= 0.98


def test_pairing_removes_what_items_have_in_common():
    rng = np.random.default_rng(3)
    hard = rng.random(100)
    a, b = means(hard), means(hard - 0.01 + 0.001 * rng.random(100))
    found, alone = paired(F1(), a, b), interval(F1(), a)
    assert 0.9 < found.low <= found.value <= found.high < 1
    assert (found.high - found.low) < (alone.high - alone.low) / 100


def test_memory_is_bounded_without_changing_the_draws(monkeypatch):
    statistics = means(np.random.default_rng(4).random(25))
    whole = interval(F1(), statistics, draws=100)
    monkeypatch.setattr(bootstrap, "CELLS", 7 * 25)
    assert interval(F1(), statistics, draws=100) == whole


def test_seeds_decide():
    statistics = means(np.random.default_rng(5).random(20))
    assert interval(F1(), statistics, seed=1) == interval(F1(), statistics, seed=1)
    assert interval(F1(), statistics, seed=1) != interval(F1(), statistics, seed=2)


def test_metrics_that_are_no_means():
    rng = np.random.default_rng(6)
    tokens = rng.integers(1, 100, 40)
    statistics = np.stack([tokens * (3 + rng.random(40)), tokens], 1)
    for metric in (Perplexity(), BitsPerByte()):
        found = interval(metric, statistics)
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(metric.value(statistics.sum(0)), rel=1e-12)


def test_a_data_set_that_no_draw_holds_is_left_out_of_the_mean():
    rows = np.zeros((12, len(DATA_SETS), 2))
    rows[:11, 0] = (1, 1)
    rows[11, 5] = (0, 1)  # one item of another data set, missing from about 1 draw in 3
    found = interval(LongBenchScore(), rows.reshape(12, -1))
    assert (found.value, found.low, found.high) == (50, 50, 100)


@pytest.mark.parametrize("n", [1, FEWEST - 1])
def test_few_items_get_no_interval(n):
    assert interval(F1(), means([0.5] * n)) == Estimate(50.0)
    assert paired(F1(), means([0.5] * n), means([0.25] * n)) == Estimate(25.0)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="shape"):
        interval(F1(), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="cannot pair"):
        paired(F1(), means([1, 2]), means([1, 2, 3]))


@given(NUMBERS)
def test_the_interval_of_a_mean_holds_it(numbers: list[float]):
    found = interval(F1(), means(numbers), draws=300)
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert 100 * min(numbers) - 1e-9 <= found.low
    assert found.high <= 100 * max(numbers) + 1e-9


@given(NUMBERS)
def test_nothing_differs_from_itself(numbers: list[float]):
    assert paired(F1(), means(numbers), means(numbers), draws=50) == Estimate(0.0, 0.0, 0.0)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_change_the_value(numbers: list[float], random):
    turned = random.sample(numbers, len(numbers))
    assert interval(F1(), means(numbers), draws=5).value == (
        interval(F1(), means(turned), draws=5).value
    )


@given(NUMBERS, NUMBERS)
def test_a_difference_turned_round_changes_its_sign(a: list[float], b: list[float]):
    n = min(len(a), len(b))
    forth = paired(F1(), means(a[:n]), means(b[:n]), draws=50)
    back = paired(F1(), means(b[:n]), means(a[:n]), draws=50)
    assert forth.value == -back.value
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)

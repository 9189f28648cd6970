"""The theory of sparse codes, against published values, sums and simulation."""

import math

import numpy as np
import pytest

from vesicle.predictors.sparse_codes import (
    false_match,
    least_threshold,
    overlap_count,
    union_false_match,
)


def patterns(rng: np.random.Generator, count: int, n: int, a: int) -> np.ndarray:
    """(count, n) random patterns with a active cells each."""
    order = rng.random((count, n)).argsort(axis=1)
    return order < a


@pytest.mark.parametrize(
    ("n", "a", "s", "theta", "published"),
    [
        (10000, 300, 24, 12, 8.37584522709849e-13),
        (100000, 2000, 6, 6, 6.35308872941916e-11),
        (100000, 2000, 10, 10, 1.00163216178113e-17),
        (100000, 2000, 12, 6, 5.29386836275369e-8),
        (100000, 2000, 24, 12, 8.58694100276592e-15),
    ],
)
def test_values_that_the_authors_published(n: int, a: int, s: int, theta: int, published: float):
    assert false_match(n, a, s, theta) == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "a", "s"), [(20, 5, 7), (20, 7, 5), (9, 9, 4), (9, 0, 4), (600, 75, 37)]
)
def test_every_pattern_overlaps_in_some_number(n: int, a: int, s: int):
    counts = [overlap_count(n, a, s, b) for b in range(n + 1)]
    assert sum(counts) == math.comb(n, a)
    assert sum(counts[min(s, a) + 1 :]) == 0
    assert false_match(n, a, s, 0) == 1
    assert false_match(n, a, s, min(s, a) + 1) == 0


def test_false_matches_are_as_frequent_as_in_a_simulation():
    n, a, s, count = 60, 8, 12, 40_000
    overlaps = patterns(np.random.default_rng(0), count, n, a)[:, :s].sum(axis=1)
    for theta in range(6):
        share = (overlaps >= theta).mean()
        expected = false_match(n, a, s, theta)
        # Five standard errors of a share.
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("most", [0.0, 1e-9, 0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("n", "a", "s"), [(48, 6, 3), (576, 72, 36), (4096, 512, 256), (16, 2, 1)])
def test_the_least_threshold_is_the_least(n: int, a: int, s: int, most: float):
    theta = least_threshold(n, a, s, most)
    assert false_match(n, a, s, theta) <= most
    assert theta == 0 or false_match(n, a, s, theta - 1) > most


def test_a_union_holds_other_patterns_as_often_as_in_a_simulation():
    n, a, many = 400, 5, 60
    rng = np.random.default_rng(1)
    shares = [
        patterns(rng, many, n, a)
        .any(axis=0)[rng.random((500, n)).argpartition(a, axis=1)[:, :a]]
        .all(axis=1)
        .mean()
        for _ in range(100)
    ]
    # The formula draws cells independently, which costs a few per cent of it here.
    assert np.mean(shares) == pytest.approx(union_false_match(n, a, many), rel=0.06)


def test_unions_fill_up():
    assert union_false_match(1000, 20, 0) == 0
    assert union_false_match(1000, 20, 1) == pytest.approx(0.02**20)
    chances = [union_false_match(1000, 20, m) for m in (1, 10, 100, 1000)]
    assert chances == sorted(chances)
    assert union_false_match(7, 7, 1) == union_false_match(7, 0, 3) == 1


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="a is 11; allowed: 0 to 10"):
        false_match(10, 11, 3, 1)
    with pytest.raises(ValueError, match="s is -1; allowed: 0 to 10"):
        overlap_count(10, 3, -1, 1)
    with pytest.raises(ValueError, match="b is -1; allowed: 0 and above"):
        overlap_count(10, 3, 3, -1)
    with pytest.raises(ValueError, match="theta is -1; allowed: 0 and above"):
        false_match(10, 3, 3, -1)
    with pytest.raises(ValueError, match=r"most is 1.5; allowed: 0 to 1"):
        least_threshold(10, 3, 3, 1.5)
    with pytest.raises(ValueError, match="n is 0; allowed: 1 and above"):
        union_false_match(0, 0, 1)
    with pytest.raises(ValueError, match="patterns is -1; allowed: 0 and above"):
        union_false_match(10, 3, -1)

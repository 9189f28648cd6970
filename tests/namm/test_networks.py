"""Scores of entries: sizes, and who looks at whom."""

import numpy as np
import pytest

from vesicle.namm import networks
from vesicle.namm.networks import KINDS, score, shapes_of, size_of, spread_of

F, H = 18, 8


def drawn(kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=size_of(kind, F, H)) * spread_of(kind, F, H)).astype(np.float32)


def features(n: int = 20) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(2, n, F)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_prefer_nothing(kind: str):
    assert (score(kind, np.zeros(size_of(kind, F, H), np.float32), features(), H) == 0).all()
    assert score(kind, drawn(kind), features(), H).std() > 0.1


def test_the_papers_size():
    """About 4,000 numbers with 17 frequencies and 32 units."""
    assert 3000 < size_of("bam", 17, 32) < 4500


@pytest.mark.parametrize("kind", KINDS)
def test_backward_attention_looks_at_newer_entries_alone(kind: str):
    x = features()
    before = score(kind, drawn(kind), x, H)
    x[:, 8] += 1
    changed = (score(kind, drawn(kind), x, H) != before).any(0)
    assert changed[8]
    assert not changed[9:].any()
    assert changed[:8].all() == (kind == "bam")


def test_how_many_look_back_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = score("bam", drawn("bam"), features(50), H)
    monkeypatch.setattr(networks, "_ROWS", 7)
    np.testing.assert_allclose(score("bam", drawn("bam"), features(50), H), whole, atol=1e-5)


def test_a_linear_one_by_hand():
    w, x = drawn("linear"), features()
    np.testing.assert_allclose(score("linear", w, x, H), x @ w[:-1] + w[-1], atol=1e-5)
    assert list(shapes_of("linear", F, H)) == ["out", "bias"]

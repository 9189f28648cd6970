"""Accuracies, perplexity and bits per byte from stored log-likelihoods."""

import math

import numpy as np
import pytest

from tests.tasks.metrics.helpers import value
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.likelihood import Accuracy, BitsPerByte, NormalisedAccuracy, Perplexity


def choice(right: int, nats: tuple[float, ...], sizes: tuple[int, ...]) -> tuple[Item, Output]:
    choices = tuple("x" * size for size in sizes)
    return (
        Item(id="q", context="", choices=choices, answer=right),
        Output(choice_nats=nats, choice_bytes=sizes),
    )


# The long third choice is the best by byte (-0.5), the short first one in sum.
NATS, SIZES = (-3.0, -9.0, -10.0, -16.0), (4, 10, 20, 16)


@pytest.mark.parametrize(("right", "plain", "normalised"), [(0, 1, 0), (1, 0, 0), (2, 0, 1)])
def test_length_decides_between_the_two_accuracies(right, plain, normalised):
    assert Accuracy().score(*choice(right, NATS, SIZES)) == plain
    assert NormalisedAccuracy().score(*choice(right, NATS, SIZES)) == normalised


def test_accuracies_are_means_in_percent_and_the_first_wins_a_tie():
    pairs = [choice(right, NATS, SIZES) for right in (0, 0, 2, 3)]
    assert value(Accuracy(), pairs) == 50
    assert value(NormalisedAccuracy(), pairs) == 25
    assert Accuracy().score(*choice(0, (-1.0, -1.0), (1, 1))) == 1
    assert Accuracy().score(*choice(1, (-1.0, -1.0), (1, 1))) == 0


def test_perplexity_is_per_token_over_all_windows_and_not_a_mean_of_windows():
    item = Item(id="w", context="")
    outputs = [Output(nats=10.0, n_tokens=5, n_bytes=20), Output(nats=2.0, n_tokens=10, n_bytes=5)]
    pairs = [(item, output) for output in outputs]
    assert value(Perplexity(), pairs) == pytest.approx(math.exp(12 / 15))
    assert value(BitsPerByte(), pairs) == pytest.approx(12 / math.log(2) / 25)
    assert not Perplexity().higher_is_better
    assert not BitsPerByte().higher_is_better


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_8_bits_per_byte():
    sums = np.array([7 * math.log(256), 7])
    assert Perplexity().value(sums) == pytest.approx(256)
    assert BitsPerByte().value(sums) == pytest.approx(8)

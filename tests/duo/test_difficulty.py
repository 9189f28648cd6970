"""Difficulty: what there is to gain, and how it is spread over tokens."""

import pytest
import torch

from vesicle.duo import (
    THREE,
    TWO,
    all_patterns,
    by_class,
    by_frequency,
    by_position,
    difficulty_of,
    entropy,
    oracle_of,
    spearman,
)


@pytest.mark.parametrize("choices", [TWO, THREE])
def test_difficulty_is_the_loss_with_small_ffns_less_the_least(context, choices):
    loss = context.evaluate(all_patterns(choices, 3)).loss
    small = context.evaluate(torch.ones(1, 3, dtype=torch.long)).loss[0]
    found = difficulty_of(oracle_of(context, choices))
    torch.testing.assert_close(found, small - loss.min(0).values, rtol=0, atol=1e-4)
    assert found.min() >= -1e-4
    assert found.max() > 0.1


def test_entropy():
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([2.0794415] * 2)
    assert entropy(torch.tensor([50.0, 0.0, 0.0])).item() == pytest.approx(0, abs=1e-6)


def test_means_by_position():
    values = torch.stack([torch.arange(20.0), torch.arange(20.0) + 2])
    found = by_position(values, 10)
    assert [group.n_tokens for group in found] == [4] * 10
    assert [group.mean for group in found] == pytest.approx([1.5 + 2 * n for n in range(10)])
    assert found[9].name == "10 of 10"


def test_means_by_frequency_keep_ties_together():
    training = torch.tensor([7] * 50 + [3] * 20 + [5] * 20 + [2])
    tokens = torch.tensor([2, 9, 3, 5, 7, 7])  # 9 never occurs
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 10.0, 20.0])
    found = by_frequency(values, tokens, training, 3)
    assert [group.n_tokens for group in found] == [2, 2, 2]
    assert [group.mean for group in found] == pytest.approx([1.5, 4.0, 15.0])


def test_means_by_class():
    found = by_class(torch.tensor([1.0, 5.0, 3.0]), ["word", "number", "word"])
    assert [(g.name, g.n_tokens, g.mean) for g in found] == [("number", 1, 5.0), ("word", 2, 2.0)]


def test_spearman_is_of_ranks_and_shares_ties():
    left = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(left, left.exp()) == pytest.approx(1)
    assert spearman(left, -left) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(left, torch.tensor([0.0, 1.0, 1.0, 9.0])) == pytest.approx(0.9486833)

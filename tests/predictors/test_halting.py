"""What holds for every predictor by which tokens stop in some layer, and for good."""

from itertools import pairwise

import pytest
import torch

from tests.predictors.test_predictors import B, L, T, hidden, released
from vesicle.predictors import Predictor

DIALS = (0.1, 0.3, 0.6, 0.9)


@pytest.fixture(params=["act", "calm"])
def halting(request: pytest.FixtureRequest) -> Predictor:
    predictor: Predictor = request.getfixturevalue(request.param)
    return predictor


def test_dial_one_is_rest_whatever_was_learnt(halting: Predictor):
    assert (released(halting, hidden(), 1.0) == 1).all()
    assert (released(halting.float(), 1000 * hidden(), 1.0) == 1).all()


@pytest.mark.parametrize("t", [0, 63, 100])
def test_causal(halting: Predictor, t: int):
    x = hidden()
    other = x.clone()
    other[:, :, t + 1 :] = hidden(1)[:, :, t + 1 :]
    assert torch.equal(released(halting, x)[:, : t + 1], released(halting, other)[:, : t + 1])


@pytest.mark.parametrize("cuts", [(1,), (17, 40, 129), tuple(range(1, T))])
def test_pieces_agree_with_the_whole(halting: Predictor, cuts: tuple[int, ...]):
    torch.testing.assert_close(
        released(halting, hidden(), cuts=cuts), released(halting, hidden()), rtol=0, atol=1e-12
    )


def test_rows_agree_with_the_whole_and_carry_nothing(halting: Predictor):
    x, state = hidden(), dict[int, torch.Tensor]()
    whole = released(halting, x).detach()
    for t in range(20):
        for layer in range(L):
            row = halting.release_row(layer, x[layer, 0, t], t, 0.6, state)
            assert row == pytest.approx(whole[0, t, layer].numpy(), abs=1e-12)
        assert not state  # between tokens, so that a sequence can be forked anywhere


def test_sequences_of_a_batch_do_not_meet(halting: Predictor):
    x = hidden()
    other = x.clone()
    other[:, 1] = hidden(1)[:, 1]
    assert torch.equal(released(halting, x)[0], released(halting, other)[0])
    positions, state = torch.arange(T).expand(B, T), dict[int, torch.Tensor]()
    for layer in range(L):
        mixed = halting.release(layer, x[layer], positions, torch.tensor([0.3, 0.9]), state)
    for row, value in enumerate((0.3, 0.9)):
        torch.testing.assert_close(mixed[row], released(halting, x, value)[row, :, -1])


def test_levels_rise_with_the_dial(halting: Predictor):
    at = [released(halting, hidden(), value) for value in (*DIALS, 1.0)]
    for low, high in pairwise(at):
        assert (low < high).all()
        assert (low >= 0.5).double().mean() < (high >= 0.5).double().mean()

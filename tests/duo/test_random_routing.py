"""Random choices: as often as they are asked for, the same for the same step, and learnt under."""

import pytest
import torch

from tests.duo.conftest import SIZE
from vesicle.duo import RandomRouting, make_duo, random_loss
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.scratch import Recipe, fit, new_decoder


def test_choices_have_their_probabilities():
    drawn = RandomRouting(big=0.3, skip=0.1, all_big=0).draw((100, 100, 4), step=2, seed=0)
    for choice, share in ((FFN_BIG, 0.3), (FFN_SKIP, 0.1), (FFN_SMALL, 0.6)):
        assert (drawn == choice).float().mean() == pytest.approx(share, abs=0.02)
    # Token by token and layer by layer: neighbours agree no more often than by chance.
    for ours, theirs in ((drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1])):
        assert (ours == theirs).float().mean() == pytest.approx(0.46, abs=0.02)


def test_a_share_of_steps_is_all_big():
    routing = RandomRouting(big=0.5, all_big=0.25)
    whole = [bool((routing.draw((4, 8, 3), n, seed=1) == FFN_BIG).all()) for n in range(400)]
    assert 70 < sum(whole) < 130
    assert not bool((RandomRouting(all_big=0).draw((4, 8, 3), 0, seed=1) == FFN_BIG).all())


def test_a_step_repeats_and_another_differs(duo):
    texts = torch.randint(SIZE.vocabulary, (8, 17))
    routing = RandomRouting(all_big=0)
    loss_at = random_loss(*duo, texts, routing, batch=8, seed=4)
    assert loss_at(3).item() == loss_at(3).item()
    # All texts are in each batch, so only what is chosen for them differs.
    assert abs(loss_at(3) - loss_at(4)) > 1e-4


def test_both_ffns_learn(tmp_path):
    model = new_decoder(SIZE, 0)
    choices = make_duo(model, ratio=4)
    texts = torch.arange(8 * 17).view(8, 17) % 11
    before = {name: p.clone() for name, p in model.named_parameters() if ".mlp." in name}
    loss_at = random_loss(model, choices, texts, RandomRouting(), batch=4)
    losses = fit(model, loss_at, Recipe(steps=15, learning_rate=1e-2), tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    assert before
    for name, p in model.named_parameters():
        if name in before:
            assert (p - before[name]).abs().max() > 1e-3, name


def test_what_is_no_probability_is_named():
    with pytest.raises(ValueError, match=r"big is 1.5; allowed: 0 to 1"):
        RandomRouting(big=1.5)
    with pytest.raises(ValueError, match=r"big \+ skip is 1.25"):
        RandomRouting(big=0.75, skip=0.5)

"""Choices are executed token by token; all big is the model as it was."""

import pytest
import torch

from tests.duo.conftest import SIZE
from vesicle.duo import always, make_duo, table
from vesicle.errors import VesicleError
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.scratch import new_decoder


def test_all_big_is_the_model_as_it_was(text):
    model = new_decoder(SIZE, 0)
    before = model(text[None]).logits
    make_duo(model)
    torch.testing.assert_close(model(text[None]).logits, before, rtol=0, atol=0)


def test_each_token_takes_what_is_chosen_for_it(duo):
    layer = duo[0].model.layers[1].mlp
    x = torch.randn(2, 6, SIZE.width)
    chosen = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])
    with duo[1].by(table(chosen[..., None].expand(-1, -1, SIZE.n_layers))):
        y = layer(x)
    for choice, want in (
        (FFN_SKIP, torch.zeros_like(x)),
        (FFN_SMALL, layer.small(x)),
        (FFN_BIG, layer.big(x)),
    ):
        torch.testing.assert_close(y[chosen == choice], want[chosen == choice])
    assert (layer.small(x) - layer.big(x)).abs().min() > 1e-6


def test_certain_probabilities_are_choices_and_others_mix(duo, text):
    model, choices = duo
    chosen = torch.randint(3, (1, len(text), SIZE.n_layers))
    certain = torch.nn.functional.one_hot(chosen, 3).float()
    with choices.by(table(chosen)) as taken:
        hard = model(text[None]).logits
    assert torch.equal(torch.stack(list(taken.values()), -1), chosen)
    with choices.by(lambda layer, x: certain[:, :, layer]):
        torch.testing.assert_close(model(text[None]).logits, hard, rtol=1e-4, atol=1e-4)
    layer, x = model.model.layers[0].mlp, torch.randn(1, 4, SIZE.width)
    with choices.by(lambda layer, x: torch.tensor([0.5, 0.2, 0.3]).expand(1, 4, 3)):
        torch.testing.assert_close(layer(x), 0.2 * layer.small(x) + 0.3 * layer.big(x))


def test_choices_end_with_their_block(duo, text):
    model, choices = duo
    before = model(text[None]).logits
    with choices.by(always(FFN_SMALL)):
        small = model(text[None]).logits
        with choices.by(always(FFN_SKIP)):
            assert (model(text[None]).logits - small).abs().max() > 0.1
        assert torch.equal(model(text[None]).logits, small)
        assert (small - before).abs().max() > 0.1
    with pytest.raises(KeyError), choices.by(always(FFN_SMALL)):
        raise KeyError
    torch.testing.assert_close(model(text[None]).logits, before, rtol=0, atol=0)


def test_the_small_ffn_has_its_share_of_units_and_repeats():
    first, second = new_decoder(SIZE, 0), new_decoder(SIZE, 0)
    state = torch.get_rng_state()
    make_duo(first, ratio=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    make_duo(second, ratio=8)
    small = first.model.layers[2].mlp.small
    assert small.gate.weight.shape == (4, SIZE.width)
    assert torch.equal(small.up.weight, second.model.layers[2].mlp.small.up.weight)
    narrow = new_decoder(SIZE, 0)
    make_duo(narrow, ratio=100)
    assert narrow.model.layers[0].mlp.small.down.weight.shape == (SIZE.width, 1)


def test_what_makes_no_sense_is_named():
    model = new_decoder(SIZE, 0)
    with pytest.raises(ValueError, match="ratio is 0; allowed: 1"):
        make_duo(model, ratio=0)
    make_duo(model)
    with pytest.raises(VesicleError, match="already"):
        make_duo(model)

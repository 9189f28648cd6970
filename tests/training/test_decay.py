"""Gates trained by gradient: what decays, what is held, and that the model stays as it was."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import CONFIGS, tiny_model, tokens
from vesicle.families import find_family
from vesicle.namm import Namm, NammSettings
from vesicle.training.decay import _decaying, _Decays, by_decay

SETTINGS = NammSettings(network="mlp", hidden=4, interval=32, observes=32, sinks=2, recent=16)


def texts(n: int, length: int = 96) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(1, 97, length).tolist() for _ in range(n)]


def prepared(name: str) -> tuple[Any, dict[int, Any], dict[int, _Decays]]:
    """A model, and modules and gates of its layers that may forget."""
    model = tiny_model(name, dtype=torch.float32)
    family = find_family(model.config)
    decoder = family.decoder_config(model.config)
    layers = np.nonzero(decoder.shape.layer_windows == 0)[0].tolist()
    modules = {n: family.modules(family.layers(model)[n]).attention for n in layers}
    return model, modules, {n: _Decays(decoder, n) for n in layers}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_does_not_decay_is_the_model_itself(name: str):
    model, modules, decays = prepared(name)
    ids = tokens(70)
    with torch.no_grad():
        for d in decays.values():
            d.weights[:, -1] = 60.0
        expected = model(ids).logits
        with _decaying(model, modules, decays):
            found = model(ids).logits
        again = model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(again, expected)
    for d in decays.values():
        np.testing.assert_allclose(
            d.held.numpy(), np.tile(np.arange(1, 71), (len(d.held), 1)), rtol=1e-5
        )


def test_an_entrys_weight_falls_with_its_age():
    _, _, decays = prepared("llama")
    d = decays[1]
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 20, 12, generator=generator)
    with torch.no_grad():
        d.weights.copy_(0.3 * torch.randn(d.weights.shape, generator=generator))
        found = d.log_weights(key, value)
    assert (found[:, torch.ones(20, 20, dtype=torch.bool).triu(1)] == -torch.inf).all()
    assert (found.diagonal(dim1=1, dim2=2) == 0).all()
    steps = found[:, 1:, :-1] - found[:, :-1, :-1]  # of one more token
    for entry in range(18):
        rows = steps[:, entry:, entry]
        assert (rows < 0).all()
        assert (rows - rows[:, :1]).abs().max() < 1e-3
    assert torch.allclose(d.held, found.exp().sum(-1))


def test_training_holds_about_what_is_allowed():
    model = tiny_model("llama", dtype=torch.float32)
    begin = Namm.fresh(SETTINGS, find_family(model.config).decoder_config(model.config).shape)
    ids = tokens(70)
    before = model(ids).logits
    notes: list[str] = []
    loose = by_decay(model, begin, texts(2), [0.5], price=0.0)
    tight = by_decay(model, begin, texts(60), [0.5], price=20.0, wait=notes.append)
    assert torch.equal(model(ids).logits, before)
    assert notes[-1] == "gates by gradient, context 60 of 60"
    assert not any(p.requires_grad for p in model.parameters())
    assert tight.settings.decays
    assert not tight.ages.size  # of another's gates
    assert tight.gates.shape == (3, 2, 25)
    assert np.exp(loose.profile).mean() > 0.85  # 96 tokens at the rate of the beginning
    assert 0.3 < np.exp(tight.profile).mean() < 0.7


def test_scores_are_the_logarithms_of_what_is_left():
    namm = Namm.fresh(NammSettings(decays=True))
    found = np.array([2.0, -1.0, 5.0], np.float32)
    rates = 1 / (1 + np.exp(-found))
    scores = namm.gated(0, 0, found, np.array([0, 4, 9], np.int32), 10)
    np.testing.assert_allclose(scores, np.log(rates) * [10, 6, 1], rtol=1e-5)
    assert (Namm.fresh().gated(0, 0, found, np.array([0, 4, 9], np.int32), 10) == found).all()

"""Attribution names neurons whose lesion moves levels; random ones do not."""

import pytest
import torch

from tests.tiny import shape_of, tiny_model, tiny_modulator, tokens
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.doses import doses
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.probes import attribute, check_by_lesion
from vesicle.phases import EVERYWHERE

LAYER, NEURON = 0, 11


def wired():
    """A model in which dopamine of layer 2 follows neuron 11 of layer 0, and hardly any other."""
    model = tiny_model("llama").requires_grad_(False)
    modulator = tiny_modulator(shape_of(model))
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.weight[:, NEURON] = 0
        model.model.layers[LAYER].mlp.down_proj.weight[5, NEURON] = 12.0
        place = modulator.predictor.config.transmitters.index("dopamine")
        weight = modulator.predictor.weight
        weight[:, place] *= 0.01
        weight[2, place, 5] = 5.0
    return Hooked(model, ModulatorMethod(modulator, 0.4, EVERYWHERE))


def test_the_wired_neuron_comes_first_and_its_lesion_moves_the_level():
    hooked = wired()
    texts = torch.cat([tokens(16, seed=s) for s in range(12)])
    found = attribute(hooked, "dopamine", texts[:3])
    assert (LAYER, NEURON) in found.top(5)
    assert found.size.shape == (3, 80)
    assert (found.size[2] == 0).all(), "the last layer's neurons come after every level"
    told = check_by_lesion(hooked, found, texts[3:], count=5, draws=3)
    assert told["named"]["mean"] > 2 * told["random"]["mean"]
    assert told["named_above_random"]["low"] > 0


def test_first_order_attribution_foretells_a_small_change():
    hooked = wired()
    texts = torch.cat([tokens(12, seed=s) for s in range(2)])
    found = attribute(hooked, "dopamine", texts)
    # Activations less their means: contributions of a neuron sum to about 0 where slopes agree.
    assert found.drive.abs().sum() < found.size.sum()


def test_doses_start_at_rest_and_cost_less_further_down():
    hooked = wired()
    rows = doses(hooked, "dopamine", torch.cat([tokens(40, seed=s) for s in range(2)]))
    assert rows[0]["dose"] == 1
    assert rows[0]["nats"] == 0
    shares = [row["share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


@pytest.mark.parametrize(
    ("method", "named"),
    [(None, "no modulator"), ("rest", "rests"), ("other", "allowed: dopamine, serotonin, gaba")],
)
def test_what_cannot_be_attributed_is_told(method, named):
    model = tiny_model("llama")
    if method is None:
        hooked = Hooked(model)
    else:
        modulator = tiny_modulator(shape_of(model))
        hooked = Hooked(model, ModulatorMethod(modulator, 1.0 if method == "rest" else 0.4))
    with pytest.raises(VesicleError, match=named):
        attribute(hooked, "caffeine", tokens(12))

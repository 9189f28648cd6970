import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_windows
from vesicle.duo import (
    Distillation,
    compare,
    distil,
    importance,
    jacobian,
    load_small_ffns,
    nested,
    own_ffns,
    relative_errors,
    replaced,
    save_small_ffns,
)
from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.evaluation.execution.language_modelling import model_shape
from vesicle.families import find_family
from vesicle.small_modules import SmallFfn


@pytest.fixture(scope="module")
def model():
    """Whose FFNs matter: its weights are far from a fresh initialisation's."""
    found = tiny_model()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "mlp" in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return found


@pytest.fixture(scope="module")
def own(model):
    return own_ffns(model)


@pytest.fixture
def windows():
    return tiny_windows(12)[:, :24]


def ffns(model):
    family = find_family(model.config)
    return [family.modules(layer).ffn for layer in family.layers(model)]


def test_all_units_are_the_ffn(model, own, windows):
    matters = importance(model, own, windows.split(4))
    whole = nested(own, matters, own.units)
    x = torch.randn(5, own.ffn_in.shape[1])
    for layer, ffn in enumerate(ffns(model)):
        torch.testing.assert_close(whole.apply_layer(layer, x), ffn(x), rtol=1e-4, atol=1e-5)


def test_units_that_give_nothing_go_first(model, own, windows):
    silenced = own.ffn_out.clone()
    silenced[:, 3] = 0
    changed = type(own)(
        ffn_in=own.ffn_in, ffn_out=silenced, activation=own.activation, gated=own.gated
    )
    matters = importance(model, changed, windows.split(4))
    assert (matters.argmin(1) == 3).all()
    kept = nested(changed, matters, own.units - 1)
    for layer in range(len(matters)):
        assert not (kept.ffn_out[layer] == 0).all(1).any()


def test_a_map_of_full_rank_has_the_mean_slope(model, own, windows):
    maps = jacobian(model, own, windows.split(4), own.ffn_in.shape[1])
    seen = {}

    def keep(layer):
        def hook(module, args):
            seen[layer] = args[0][:, 1:]

        return hook

    handles = [f.register_forward_pre_hook(keep(n)) for n, f in enumerate(ffns(model))]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    for layer, ffn in enumerate(ffns(model)):
        x = seen[layer].flatten(0, 1)
        slopes = torch.func.vmap(torch.func.jacrev(lambda one, ffn=ffn: ffn(one)))(x).mean(0)
        found = maps.up[layer] @ maps.down[layer]
        torch.testing.assert_close(found, slopes, rtol=1e-3, atol=1e-4)
        mean = maps.apply_layer(layer, x).mean(0)
        torch.testing.assert_close(mean, ffn(x).mean(0), rtol=1e-3, atol=1e-4)


def test_training_comes_nearer_and_leaves_the_model_alone(model, own, windows, tmp_path):
    before = {name: p.clone() for name, p in model.named_parameters()}
    matters = importance(model, own, windows.split(4))
    start, small = nested(own, matters, 6), nested(own, matters, 6)
    how = Distillation(passes=60, windows=4, parts=2, learning_rate=1e-2)
    losses = distil(model, windows, small, how, tmp_path)
    assert len(losses) == how.steps
    errors = relative_errors(model, windows, {"start": start, "end": small})
    assert all(e < 0.9 * s for s, e in zip(errors["start"], errors["end"], strict=True))
    assert all(torch.equal(p, p.bfloat16().float()) for p in small.parameters())
    assert small.coded
    again = nested(own, matters, 6)  # the run is there; only the rounding is another
    plain = Distillation(passes=60, windows=4, parts=2, learning_rate=1e-2, coded=False)
    distil(model, windows, again, plain, tmp_path)
    assert not again.coded
    assert all(torch.equal(p, p.bfloat16().float()) for p in again.parameters())
    errors |= relative_errors(model, windows, {"plain": again})
    assert all(p <= e + 1e-3 for p, e in zip(errors["plain"], errors["end"], strict=True))
    assert not any(p.requires_grad for p in small.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(model, own, windows, tmp_path):
    matters = importance(model, own, windows.split(4))
    how = Distillation(passes=10, windows=3, parts=2)
    whole, broken = nested(own, matters, 4), nested(own, matters, 4)
    expected = distil(model, windows, whole, how, tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(step, error):
        if step == 13:
            raise Cut

    with pytest.raises(Cut):
        distil(model, windows, broken, how, tmp_path / "broken", show=cut)
    again = nested(own, matters, 4)
    assert distil(model, windows, again, how, tmp_path / "broken") == expected
    assert torch.equal(again.ffn_in, whole.ffn_in)
    with pytest.raises(VesicleError, match="another passes"):
        distil(
            model, windows, again, Distillation(passes=11, windows=3, parts=2), tmp_path / "broken"
        )


def test_compared_in_the_model_itself(model, own, windows):
    shape = model_shape(model)
    matters = importance(model, own, windows.split(4))
    kinds = {
        "whole": nested(own, matters, own.units),
        "nothing": SmallFfn(shape.n_layers, shape.width, 2),
    }
    dense = model(windows).logits
    found = compare(model, windows, shape, kinds, (1, shape.n_layers, 99))
    assert torch.equal(model(windows).logits, dense)  # nothing stays behind
    assert max(abs(r) for r in found["whole"].alone) < 1e-5
    nothing = found["nothing"]
    assert len(nothing.points) == 3
    assert nothing.points[1].layers == (min(range(shape.n_layers), key=nothing.alone.__getitem__),)
    assert nothing.points[0].flops == 1 > nothing.points[1].flops > nothing.points[2].flops
    halfway = (nothing.points[0].flops + nothing.points[1].flops) / 2
    assert nothing.at(halfway) == pytest.approx(nothing.points[1].rise / 2)
    assert nothing.at(nothing.points[2].flops - 0.01) is None
    # With all layers at nothing only attention is left.
    with replaced(model, kinds["nothing"], range(shape.n_layers)):
        alone = model(windows).logits
    assert not torch.allclose(alone, dense)


def test_saved_and_read(model, own, tmp_path):
    shape = model_shape(model)
    small = nested(own, torch.rand(own.ffn_out.shape[:2]), 5)
    save_small_ffns(small, tmp_path, model=shape, trained={"passes": 1})
    again = load_small_ffns(tmp_path, shape)
    assert again.size == small.size
    assert torch.equal(again.ffn_in, small.ffn_in.bfloat16().float())
    with pytest.raises(VesicleError, match=r"holds no small_ffns\.json; vesicle distil writes one"):
        load_small_ffns(tmp_path / "none", shape)
    import dataclasses

    with pytest.raises(VesicleError, match="of another model"):
        load_small_ffns(tmp_path, dataclasses.replace(shape, width=shape.width * 2))
    (tmp_path / "small_ffns.safetensors").write_bytes(b"1234")
    with pytest.raises(VesicleError, match="cannot read"):
        load_small_ffns(tmp_path, shape)


def test_what_is_refused(model, own, windows, tmp_path):
    with pytest.raises(VesicleError, match="passes is 0; allowed: 1 and above"):
        Distillation(passes=0)
    with pytest.raises(VesicleError, match=r"learning_rate is 0\.0; allowed: above 0"):
        Distillation(learning_rate=0.0)
    matters = torch.rand(own.ffn_out.shape[:2])
    with pytest.raises(ModelError, match=f"0 hidden units; allowed: 1 to {own.units}"):
        nested(own, matters, 0)
    with pytest.raises(ModelError, match="rank is 0; allowed: 1 to"):
        jacobian(model, own, windows.split(4), 0)
    with pytest.raises(DataError, match="2 tokens or more"):
        distil(model, windows[:, :1], nested(own, matters, 4), Distillation(passes=1), tmp_path)

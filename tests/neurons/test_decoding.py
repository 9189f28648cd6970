"""Neurons as tokens, clamps and the lens: what was planted is found, and by no control."""

from pathlib import Path

import pytest
import torch

from tests.tiny import CONFIGS, tiny_model, tokens
from vesicle.errors import DataError, VesicleError
from vesicle.neurons.clamping import clamp_specialised, largest_values, next_chances
from vesicle.neurons.decoding.lens import compare, fit_lens, load_lens
from vesicle.neurons.decoding.readout import Readout, likeliest
from vesicle.neurons.decoding.tokens import Decoded, decode_all, same_top_token
from vesicle.neurons.edits import Edit, clamp
from vesicle.neurons.hooks import Hooked

TOKEN, NEURON, LAYER = 31, 7, 2


def planted():
    """A model whose neuron 7 of the last layer writes what the head reads as token 31."""
    model = tiny_model("llama").requires_grad_(False)
    readout = Readout(model)
    down = model.model.layers[LAYER].mlp.down_proj.weight
    with torch.no_grad():
        own = readout.head[TOKEN] * model.model.norm.weight
        down[:, NEURON] = 3 * own / own.norm()
    return model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_direction_that_a_neuron_writes_is_what_its_clamp_adds(name: str):
    model = tiny_model(name)
    hooked, readout, out = Hooked(model), Readout(model), "blocks.1.hook_mlp_out"
    held = []
    for value in (0.0, 1.0):
        seen = hooked.run(tokens(6), read=[out], edits=[clamp("blocks.1.mlp.hook_post", 3, value)])
        held.append(seen[out][0, 2].double())
    added = held[1] - held[0]
    written = readout.directions(1, "down")[3].double()
    # Up to a length: of Gemma a norm follows.
    cosine = torch.nn.functional.cosine_similarity(added, written, dim=0)
    assert cosine > (0.9 if name == "gemma3" else 0.9999)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_neuron_is_excited_most_by_the_direction_that_it_reads(name: str):
    model = tiny_model(name)
    readout, hooked = Readout(model), Hooked(model)
    pre = "blocks.1.mlp.hook_pre"
    direction = readout.directions(1, readout.kinds[0])[5]
    if not hooked._family.decoder_config(model.config).rms_norm:
        direction = direction - direction.mean()  # LayerNorm takes the mean away
    base = hooked.run(tokens(6), read=[pre])[pre][0, :, 5]
    point = "blocks.1.hook_resid_pre" if name == "gpt_neox_parallel" else "blocks.1.hook_resid_mid"
    found = []
    random = torch.randn_like(direction)
    for own in (direction, random / random.norm() * direction.norm()):
        edit = Edit(name=point, how="add", value=5 * own / own.norm())
        found.append((hooked.run(tokens(6), read=[pre], edits=[edit])[pre][0, :, 5] - base).mean())
    assert found[0] > abs(found[1])
    assert found[0] > 0


def test_logits_of_a_final_hidden_state_are_the_models_own():
    model = tiny_model("llama")
    readout = Readout(model)
    seen = Hooked(model).run(tokens(9), read=["blocks.2.hook_resid_post"])
    own = readout.logits(seen["blocks.2.hook_resid_post"][0].float())
    torch.testing.assert_close(own, seen.logits[0].float(), atol=2e-3, rtol=1e-3)


def test_likeliest_counts_both_ways():
    logits = torch.tensor([[0.0, 4.0, -9.0, 1.0]])
    found = likeliest(logits, 2)
    assert found.ids.tolist() == [[[1, 3], [2, 0]]]
    torch.testing.assert_close(found.chances[0, 0, 0], logits[0].softmax(0)[1])
    torch.testing.assert_close(found.chances[0, 1, 0], (-logits[0]).softmax(0)[2])
    assert found.scores[0, 1] > found.scores[0, 0] > 0


def test_a_planted_neuron_is_the_most_specialised_and_does_what_it_says(tmp_path: Path):
    model = planted()
    decoded = decode_all(model, tmp_path, name="planted", k=3)
    token, _, way = decoded.best("down")
    assert token[LAYER, NEURON] == TOKEN
    assert way[LAYER, NEURON] == 1
    hooked, prompts = Hooked(model), torch.cat([tokens(8, seed=s) for s in range(4)])
    most = largest_values(hooked, prompts, "down")
    effect = clamp_specialised(hooked, decoded, "down", prompts, most, count=4, strength=30.0)
    own = [one for one in effect.specialised if (one.layer, one.index) == (LAYER, NEURON)]
    assert own
    assert own[0].nats > 1
    assert own[0].nats > own[0].other
    summary = effect.summary()
    assert summary["specialised"]["mean"] == pytest.approx(
        sum(one.nats for one in effect.specialised) / 4
    )
    layers = [one.layer for one in effect.specialised]
    assert [one.layer for one in effect.random] == layers
    assert not {(o.layer, o.index) for o in effect.random} & {
        (o.layer, o.index) for o in effect.specialised
    }


def test_decoding_goes_on_where_it_was_cut_off_and_refuses_another_model(tmp_path: Path):
    model = planted()
    whole = decode_all(model, tmp_path / "whole", name="planted", k=3)

    class Stop(Exception):
        pass

    def stop(done: int, note: str) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        decode_all(model, tmp_path / "cut", name="planted", k=3, show=stop)
    assert len(list((tmp_path / "cut" / "layers").glob("*.json"))) == 2
    again = decode_all(model, tmp_path / "cut", name="planted", k=3)
    assert torch.equal(again.ids, whole.ids)
    assert not (tmp_path / "cut" / "layers").exists()
    assert torch.equal(Decoded.load(tmp_path / "cut").scores, whole.scores)
    with pytest.raises(VesicleError, match="k 3, not 4"):
        decode_all(model, tmp_path / "cut", name="planted", k=4)
    with pytest.raises(VesicleError, match="another model"):
        again.check(tiny_model("qwen2"))


def test_a_checkpoint_keeps_its_own_tokens(tmp_path: Path):
    one = decode_all(planted(), tmp_path / "one", name="a", k=2)
    model = planted()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, :40] = torch.randn(48, 40)
    other = decode_all(model, tmp_path / "other", name="b", k=2)
    assert same_top_token(one, one, "down")["same"] == 1
    assert same_top_token(one, other, "up")["same"] == 1
    shared = same_top_token(one, other, "down")
    assert 0.8 < shared["same"] < 0.9
    assert shared["shuffled"] < 0.3
    neox = decode_all(tiny_model("gpt_neox_parallel"), tmp_path / "neox", name="c", k=2)
    with pytest.raises(DataError, match="one shape"):
        same_top_token(one, neox, "down")


def test_what_is_out_of_range_is_named(tmp_path: Path):
    model = planted()
    decoded = decode_all(model, tmp_path, name="planted", k=3)
    hooked, ids = Hooked(model), tokens(6)
    most = largest_values(hooked, ids, "down")
    with pytest.raises(VesicleError, match="allowed: gate, up, down"):
        clamp_specialised(hooked, decoded, "sideways", ids, most)
    with pytest.raises(VesicleError, match="allowed: 1 to 120"):
        clamp_specialised(hooked, decoded, "down", ids, most, count=121)
    with pytest.raises(VesicleError, match="allowed: 1 to 97"):
        decode_all(model, tmp_path / "k", name="planted", k=98)


# The lens -----------------------------------------------------------------------------------------


def test_the_lens_is_the_jacobian(tmp_path: Path):
    model = tiny_model("llama").requires_grad_(False)
    hooked = Hooked(model)
    texts = torch.cat([tokens(7, seed=s) for s in range(3)])
    lens = fit_lens(hooked, texts, tmp_path, batch=2)
    assert torch.equal(lens[2], torch.eye(48))
    name, end = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
    step, direction = 1e-2, torch.randn(48, generator=torch.Generator().manual_seed(3))
    moved = []
    for text in texts:
        base = hooked.run(text[None], read=[name, end])
        edits = [Edit(name=name, how="add", value=step * direction, tokens=[6])]
        moved.append((hooked.run(text[None], read=[end], edits=edits)[end] - base[end])[0, 6])
    mean = torch.stack(moved).mean(0) / step
    foretold = lens[1] @ direction
    assert torch.nn.functional.cosine_similarity(mean, foretold, dim=0) > 0.99
    assert float(foretold.norm() / mean.norm()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(load_lens(tmp_path, model), lens)


def test_a_lens_is_gone_on_with_and_is_of_its_texts_alone(tmp_path: Path):
    model = tiny_model("llama").requires_grad_(False)
    hooked, texts = Hooked(model), torch.cat([tokens(5, seed=s) for s in range(3)])

    class Stop(Exception):
        pass

    def stop(done: int, note: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit_lens(hooked, texts, tmp_path / "cut", batch=1, show=stop)
    again = fit_lens(hooked, texts, tmp_path / "cut", batch=1)
    torch.testing.assert_close(again, fit_lens(hooked, texts, tmp_path / "whole", batch=1))
    with pytest.raises(VesicleError, match="other texts"):
        fit_lens(hooked, texts.flip(0), tmp_path / "cut")


def test_readouts_are_compared_over_layers(tmp_path: Path):
    model = planted()
    hooked, texts = Hooked(model), torch.cat([tokens(6, seed=s) for s in range(6)])
    lens = fit_lens(hooked, texts[:3], tmp_path)
    found = compare(
        hooked, lens, texts[3:], largest_values(hooked, texts, "down"), count=9, strength=0.05
    )
    assert len(found["by_third"]) == 3
    # In the last layer the two are the same readout, and small clamps do what they foretell.
    last = found["by_third"][2]
    assert last["lens_above_plain"]["mean"] == pytest.approx(0, abs=1e-6)
    assert last["lens"]["mean"] > 0.5 > abs(last["shuffled"]["mean"])


def test_the_next_token_is_judged_under_the_edits():
    hooked, ids = Hooked(planted()), tokens(5)
    plain = next_chances(hooked, ids, [])
    torch.testing.assert_close(plain, hooked.run(ids).logits[:, -1].float().log_softmax(-1))
    held = next_chances(hooked, ids, [clamp(f"blocks.{LAYER}.mlp.hook_post", NEURON, 50.0, [4])])
    assert held[0, TOKEN] > plain[0, TOKEN]

"""Names, reads and edits: what is read is what was computed, and idle hooks change nothing."""

import numpy as np
import pytest
import torch

from tests.tiny import CONFIGS, shape_of, tiny_model, tiny_modulator, tokens
from vesicle.errors import ModelError, VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.decisions import EditedMethod
from vesicle.neurons.edits import Edit, clamp, lesion, transplant
from vesicle.neurons.hooks import Hooked
from vesicle.phases import EVERYWHERE
from vesicle.plan import Replay, resting_rows
from vesicle.reference.attach import attach

T = 24


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest):
    return tiny_model(request.param)


def modulated(name: str = "llama", dial: float = 0.4):
    model = tiny_model(name)
    return model, ModulatorMethod(tiny_modulator(shape_of(model)), dial, EVERYWHERE)


def test_idle_hooks_change_no_bit_and_are_gone_afterwards(model):
    ids = tokens(T, batch=2)
    before = model(ids, use_cache=False).logits
    hooked = Hooked(model)
    read = [n for n in hooked.names if "pattern" not in n]
    seen = hooked.run(ids, read=read)
    assert torch.equal(seen.logits, before)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_is_read_adds_up(model):
    hooked = Hooked(model)
    seen = hooked.run(tokens(T, batch=2), read=["*"])
    for layer in range(hooked.shape.n_layers):
        p = f"blocks.{layer}."
        added = seen[p + "hook_attn_out"] + seen[p + "hook_mlp_out"]
        torch.testing.assert_close(
            seen[p + "hook_resid_pre"] + added, seen[p + "hook_resid_post"], atol=1e-4, rtol=1e-4
        )
        pattern = seen[p + "attn.hook_pattern"]
        torch.testing.assert_close(
            pattern.double().sum(-1), torch.ones(pattern.shape[:3]).double(), atol=1e-6, rtol=0
        )
        assert seen[p + "mlp.hook_post"].shape == (2, T, hooked.shape.ffn_width)
    assert torch.equal(seen["hook_embed"], seen["blocks.0.hook_resid_pre"])


def test_a_neuron_is_what_the_down_projection_reads(model):
    hooked, ids = Hooked(model), tokens(T)
    name, out = "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"
    plain = hooked.run(ids, read=[name, out])
    held = hooked.run(ids, read=[name, out], edits=[clamp(name, 5, 3.0, tokens=[7, 9])])
    assert (held[name][0, [7, 9], 5] == 3.0).all()
    others = torch.ones_like(held[name], dtype=torch.bool)
    others[0, [7, 9], 5] = False
    assert torch.equal(held[name][others], plain[name][others])
    moved = (held[out] != plain[out]).any(-1)[0]
    assert moved.nonzero()[:, 0].tolist() == [7, 9]
    assert torch.equal(held.logits[:, :7], plain.logits[:, :7]), (
        "an edit acts on later tokens alone"
    )
    assert not torch.equal(held.logits[:, 7:], plain.logits[:, 7:])


def test_a_whole_residual_stream_transplanted_is_the_other_text(model):
    hooked = Hooked(model)
    one, two = tokens(T, seed=1), tokens(T, seed=2)
    name = "blocks.1.hook_resid_post"
    other = hooked.run(two, read=[name])
    held = hooked.run(one, edits=[transplant(name, other[name])])
    torch.testing.assert_close(held.logits, other.logits)
    part = hooked.run(one, read=[name], edits=[transplant(name, other[name], tokens=[3])])
    assert torch.equal(part[name][:, 3], other[name][:, 3])


def test_edits_hold_in_generation_at_the_columns_that_they_name():
    model = tiny_model("llama")
    hooked, ids = Hooked(model), tokens(6)
    name = "blocks.0.mlp.hook_post"
    with hooked.hold([clamp(name, 1, 9.0, tokens=[2, 8])], read=[name]) as seen:
        model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    found = seen[name]
    assert found.shape[1] == 10
    assert (found[0, :, 1] == 9.0).nonzero()[:, 0].tolist() == [2, 8]


def test_gradients_reach_what_was_read():
    model = tiny_model("llama").requires_grad_(False)
    name = "blocks.0.mlp.hook_post"
    seen = Hooked(model).run(tokens(T), read=[name], gradients=True)
    (slope,) = torch.autograd.grad(seen.logits[0, -1, 3], [seen[name]])
    step = 1e-2
    base = seen.logits[0, -1, 3].item()
    up = Hooked(model).run(tokens(T), edits=[Edit(name=name, how="add", value=step, index=4)])
    expected = slope[..., 4].sum().item() * step
    assert up.logits[0, -1, 3].item() - base == pytest.approx(expected, rel=0.15, abs=1e-4)


# Levels and decisions -----------------------------------------------------------------------------


def test_levels_that_nobody_edits_are_those_of_attach():
    model, method = modulated()
    ids = tokens(T)
    with torch.no_grad(), attach(model, method) as run:
        plain = model(ids, use_cache=False).logits
    seen = Hooked(model, method).run(ids, edits=[clamp("blocks.2.hook_levels", "gaba", 1.0, [])])
    assert torch.equal(seen.logits, plain)
    assert np.array_equal(seen.run.plan.rows, run.plan.rows)
    assert np.array_equal(seen.run.levels[0], run.levels[0])


def test_a_clamped_level_decides_here_and_in_the_next_attention():
    model, method = modulated()
    hooked, ids = Hooked(model, method), tokens(T)
    plain = hooked.run(ids)
    held = hooked.run(ids, edits=[clamp("blocks.1.hook_levels", "dopamine", 0.0, tokens=[4])])
    assert held["blocks.1.hook_levels"][0, 4, 0] == 0
    name = "plan.channels"
    for layer, sites in ((1, [2, 3]), (2, [0, 1])):
        before, after = plain[f"blocks.{layer}.{name}"], held[f"blocks.{layer}.{name}"]
        assert (after[0, 4, sites] < before[0, 4, sites]).all()
        assert torch.equal(after[0, :4], before[0, :4])
    assert torch.equal(
        held["blocks.1.hook_levels"][0, 5:, 1], plain["blocks.1.hook_levels"][0, 5:, 1]
    )
    assert held.run.cost.flops_total < plain.run.cost.flops_total


def test_lesions_of_all_levels_are_the_dense_model():
    model, method = modulated()
    ids = tokens(T)
    dense = model(ids, use_cache=False).logits
    edits = [lesion(f"blocks.{layer}.hook_levels") for layer in range(3)]
    held = Hooked(model, method).run(ids, edits=edits)
    torch.testing.assert_close(held.logits, dense)
    at_rest = resting_rows(held.run.shape, np.arange(T, dtype=np.int32))
    assert np.array_equal(held.run.plan.rows, at_rest)


def test_fields_of_a_plan_are_edited_with_no_modulator_at_all():
    model = tiny_model("llama")
    hooked, ids = Hooked(model), tokens(T)
    edits = [
        clamp("blocks.1.plan.ffn", 0, 0, tokens=[3]),
        clamp("blocks.2.plan.channels", "attention_in", 7),
        clamp("blocks.2.plan.channels", "ffn_out", 9),
    ]
    held = hooked.run(ids, edits=edits, read=["blocks.1.hook_mlp_out"])
    rows = held.run.plan.rows
    assert rows["ffn"][3, 1] == 0
    assert (np.delete(rows["ffn"][:, 1], 3) == 2).all()
    assert (rows["channels"][:, 2, 0] == 7).all()
    assert (rows["channels"][:, 2, 3] == 9).all()
    assert (held["blocks.1.hook_mlp_out"][0, 3] == 0).all()
    assert torch.equal(
        held["blocks.2.plan.channels"][0, :, 0], torch.full((T,), 7, dtype=torch.int32)
    )


def test_an_edited_method_replays_in_the_engine_as_it_was():
    model, method = modulated()
    ids = tokens(T)
    held = Hooked(model, method).run(ids, edits=[clamp("blocks.0.hook_levels", "serotonin", 0.0)])
    with torch.no_grad(), attach(model, Replay(held.run.plan, method.stand_ins)):
        again = model(ids, use_cache=False).logits
    torch.testing.assert_close(again, held.logits)


def test_a_fork_goes_on_as_the_whole_does():
    model, method = modulated()
    edit = clamp("blocks.1.hook_levels", "gaba", 0.5, tokens=[2, 9]).checked(5)
    whole, part = (EditedMethod(method, [edit]).author(shape_of(model)) for _ in range(2))
    hidden = torch.randn(12, 48, generator=torch.Generator().manual_seed(1)).double()

    def read(author, start, stop):
        positions = np.arange(start, stop, dtype=np.int32)
        rows = resting_rows(author.shape, positions)
        for layer in range(3):
            author.attention(layer, positions, rows[:, layer])
            author.ffn(layer, hidden[start:stop], positions, rows[:, layer])
        return rows

    expected = read(whole, 0, 12)
    read(part, 0, 8)
    other = part.fork(6)
    assert np.array_equal(read(other, 6, 12), expected[6:])
    assert np.array_equal(other.levels, whole.levels)
    assert whole.levels[9, 1, 2] == 0.5
    part.rewind(6)
    assert np.array_equal(read(part, 6, 12), expected[6:])
    assert np.array_equal(part.levels, whole.levels)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "named", "allowed"),
    [
        (clamp("blocks.9.mlp.hook_post", 0, 1.0), "blocks.9.mlp.hook_post", "N from 0 to 2"),
        (clamp("blocks.1.mlp.hook_post", 80, 1.0), "80", "0 to 79"),
        (clamp("blocks.1.mlp.hook_post", -1, 1.0), "-1", "0 to 79"),
        (clamp("blocks.1.mlp.hook_post", "gaba", 1.0), "gaba", "0 to 79"),
        (clamp("blocks.1.mlp.hook_post", 0, 1.0, tokens=[-3]), "-3", "0 and up"),
        (clamp("blocks.1.hook_levels", "caffeine", 1.0), "caffeine", "dopamine, serotonin"),
        (clamp("blocks.1.plan.channels", 0, 0), "0", "1 to 48"),
        (clamp("blocks.1.attn.hook_pattern", 0, 1.0), "hook_pattern", "read and not edited"),
        (clamp("blocks.1.hook_mlp_out", None, torch.ones(3)), "(3,)", "(48,)"),
        (transplant("blocks.1.hook_mlp_out", torch.ones(1, 4, 48)), "4 tokens", "transplanted"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(edit, named, allowed):
    model, method = modulated()
    hooked = Hooked(model, method)
    with pytest.raises(VesicleError) as told:
        hooked.run(tokens(T), edits=[edit])
    assert named in str(told.value)
    assert allowed in str(told.value)
    ids = tokens(T)
    plain = hooked.run(ids)  # nothing is left behind
    with torch.no_grad(), attach(model, method):
        assert torch.equal(model(ids, use_cache=False).logits, plain.logits)


def test_levels_need_a_modulator():
    with pytest.raises(VesicleError, match="hook_levels"):
        Hooked(tiny_model("llama")).run(tokens(4), edits=[lesion("blocks.0.hook_levels")])


def test_token_ids_out_of_range_are_named():
    with pytest.raises(VesicleError, match="token id 97 is out of range; allowed: 0 to 96"):
        Hooked(tiny_model("llama")).run(torch.tensor([[3, 97]]))


def test_a_second_body_is_refused():
    hooked = Hooked(tiny_model("llama"))
    with hooked.hold(), pytest.raises(VesicleError, match="held already"), hooked.hold():
        pass


def test_a_model_that_is_not_run_as_its_family_is_refused():
    model = tiny_model("llama")
    drifts = iter(range(1000))
    model.model.norm.register_forward_hook(lambda m, args, out: out + next(drifts))
    with pytest.raises(ModelError, match="differ"):
        Hooked(model)
    assert Hooked(model, check=False).shape.n_layers == 3

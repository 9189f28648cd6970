"""Contexts are those of a plain look at all activations, however the pass was cut."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.neurons.tiny_cards import tiny_text
from tests.tiny import CONFIGS, VOCABULARY, shape_of, tiny_model, tokens
from vesicle.errors import DataError, VesicleError
from vesicle.neurons.contexts import (
    Contexts,
    ContextSettings,
    collect,
    collect_from,
    neuron_reader,
    windows_of,
)
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.neurons.running_top import RunningTop

SETTINGS = ContextSettings(k=6, skip=3, drawn=40, seed=0, block=2)
WINDOWS = tokens(41, batch=7)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""Activations are kept in fp32, and sums of windows are taken in it."""


def all_activations(model) -> Tensor:
    """(L, F, N, T)."""
    hooked = Hooked(model)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(hooked.shape.n_layers)]
    rows = []
    for window in WINDOWS:
        seen = hooked.run(window[None], read=names)
        rows.append(torch.stack([seen[name][0].float().T for name in names]))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_contexts_are_what_brute_force_finds(name: str):
    model = tiny_model(name)
    found = collect(Hooked(model), WINDOWS, SETTINGS)
    skip, t = SETTINGS.skip, WINDOWS.shape[1]
    counted = all_activations(model)[..., skip:]
    flat = counted.flatten(2)
    for low in (False, True):
        values, places = found.extremes(low=low)
        order = flat.sort(dim=-1, descending=not low, stable=True).indices[..., : SETTINGS.k]
        torch.testing.assert_close(values, flat.gather(-1, order), **TOLERANCE)
        expected = torch.stack([order // (t - skip), order % (t - skip) + skip], -1)
        assert torch.equal(places.long(), expected)
    torch.testing.assert_close(found.mean, flat.double().mean(-1), **TOLERANCE)
    torch.testing.assert_close(found.mean_square, flat.double().square().mean(-1), **TOLERANCE)
    assert torch.equal(found.maximum, found.activations[..., 0])
    assert torch.equal(found.minimum, found.low_activations[..., 0])
    window, token = found.drawn_places.long().T
    drawn = counted[:, :, window, token - skip]
    torch.testing.assert_close(found.drawn_activations.float(), drawn, atol=1e-2, rtol=1e-2)


def test_drawn_places_are_spread_evenly_and_count():
    found = collect(Hooked(tiny_model("llama")), WINDOWS, SETTINGS)
    window, token = found.drawn_places.long().T
    assert int(token.min()) >= SETTINGS.skip
    number = window * (WINDOWS.shape[1] - SETTINGS.skip) + token - SETTINGS.skip
    edges = torch.arange(SETTINGS.drawn + 1) * found.n_tokens // SETTINGS.drawn
    assert (edges[:-1] <= number).all()
    assert (number < edges[1:]).all()
    other = collect(Hooked(tiny_model("llama")), WINDOWS, replace(SETTINGS, seed=1))
    assert not torch.equal(other.drawn_places, found.drawn_places)


def test_shares_above_half_of_the_maximum():
    model = tiny_model("llama")
    every = replace(SETTINGS, drawn=WINDOWS.numel() - len(WINDOWS) * SETTINGS.skip)
    found = collect(Hooked(model), WINDOWS, every)
    flat = all_activations(model)[..., SETTINGS.skip :].flatten(2)
    exact = (flat > 0.5 * flat.amax(-1, keepdim=True)).float().mean(-1)
    # All places are drawn, in bf16: a token at the very bound may fall on either side.
    torch.testing.assert_close(found.share_above(), exact, atol=2 / found.n_tokens, rtol=0.02)
    with pytest.raises(DataError, match="fraction is 1"):
        found.share_above(1.0)


# A pass that was cut off --------------------------------------------------------------------------


def alike(one: Contexts, other: Contexts) -> None:
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs), name
        else:
            assert value == theirs, name


@pytest.mark.parametrize("block", [1, 3, 100])
def test_a_pass_goes_on_and_ends_as_if_it_had_not_been_cut_off(tmp_path: Path, block: int):
    hooked = Hooked(tiny_model("llama"))
    whole = collect(hooked, WINDOWS, SETTINGS)
    settings, read = replace(SETTINGS, block=block), []
    reader = neuron_reader(hooked)

    def cut(window: Tensor):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(window)
        return reader(window)

    what = whole.facts["of"]
    with pytest.raises(KeyboardInterrupt):
        collect_from(cut, WINDOWS, settings, tmp_path, what=what)
    steps = []
    again = collect(hooked, WINDOWS, settings, tmp_path, show=lambda step, note: steps.append(step))
    assert steps[0] == 5 // block * block + 1
    alike(again, whole)
    alike(Contexts.load(tmp_path), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"contexts.json", "contexts.safetensors"}

    def never(step: int, note: str) -> None:
        raise AssertionError("it is finished")

    alike(collect(hooked, WINDOWS, SETTINGS, tmp_path, show=never), whole)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_pass_is_refused(tmp_path: Path, finished: bool):
    hooked = Hooked(tiny_model("llama"))
    if finished:
        collect(hooked, WINDOWS, SETTINGS, tmp_path)
    else:
        reader, read = neuron_reader(hooked), []

        def cut(window: Tensor):
            read.append(window)
            return reader(window) if len(read) < 4 else [][0]

        what = collect(hooked, WINDOWS, SETTINGS).facts["of"]
        with pytest.raises(IndexError):
            collect_from(cut, WINDOWS, SETTINGS, tmp_path, what=what)
    with pytest.raises(VesicleError, match=r"k '?6'?, not '?5'?"):
        collect(hooked, WINDOWS, replace(SETTINGS, k=5), tmp_path)
    with pytest.raises(VesicleError, match="windows"):
        collect(hooked, WINDOWS.roll(1, 0), SETTINGS, tmp_path)
    with pytest.raises(VesicleError, match="another folder"):
        collect(Hooked(tiny_model("llama", seed=4)), WINDOWS, SETTINGS, tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path):
    collect(Hooked(tiny_model("llama")), WINDOWS, SETTINGS, tmp_path)
    (tmp_path / "contexts.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"contexts\.safetensors cannot be read"):
        Contexts.load(tmp_path)
    (tmp_path / "contexts.json").write_text(json.dumps({"k": 1}))
    with pytest.raises(DataError, match="cannot be read"):
        Contexts.load(tmp_path)


# The running top ----------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    k=st.integers(1, 12),
    values=st.integers(2, 40),
    lowest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_running_top_is_a_stable_sort_of_all_rows(lengths, k, values, lowest, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties: the earlier row stands first.
    whole = torch.randint(-values, values, (sum(lengths), 5), generator=generator).float()
    kept = torch.full((5, k), -torch.inf), torch.full((5, k), -1, dtype=torch.int32)
    first = 0
    for part in whole.split(lengths):
        RunningTop(*kept, lowest=lowest).update(part, first)
        first += len(part)
    signed = -whole if lowest else whole
    expected, places = signed.T.sort(dim=1, descending=True, stable=True)
    n = min(k, len(whole))
    assert torch.equal(kept[0][:, :n], expected[:, :n])
    assert torch.equal(kept[1][:, :n].long(), places[:, :n])
    assert (kept[0][:, n:] == -torch.inf).all()
    assert (kept[1][:, n:] == -1).all()


# Windows and names --------------------------------------------------------------------------------


def test_windows_are_the_text_in_order():
    text = tiny_text()
    windows = windows_of(text, ["One sentence.", "And another one, which is longer."], 8)
    joined = text.encode("One sentence.\n\nAnd another one, which is longer.")
    assert windows.flatten().tolist() == joined[: windows.numel()]
    with pytest.raises(DataError, match="up to 512"):
        windows_of(text, ["One sentence."], 513)


def test_a_neuron_is_read_as_it_is_written():
    shape = shape_of(tiny_model("llama"))
    for neuron in (Neuron(0, 0), Neuron(2, 79)):
        assert Neuron.parse(f" {neuron} ", shape) == neuron
    for bad in ("3.0", "0.80", "1", "1.", "-1.2", "1.2.3", "a.b", "", "1e3.2"):
        with pytest.raises(DataError, match=r"allowed: LAYER\.NEURON, 0\.0 to 2\.79"):
            Neuron.parse(bad, shape)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k is 0; allowed: 1"),
        ({"k": 267}, "k is 267; allowed: up to 266"),
        ({"drawn": 267}, "drawn is 267; allowed: up to 266"),
        ({"skip": 41}, "windows have 41 tokens; allowed: more than skip, 41"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict, told: str):
    with pytest.raises(DataError, match=told):
        collect(Hooked(tiny_model("llama")), WINDOWS, replace(SETTINGS, **change))


def test_tokens_out_of_range_are_named():
    ids = WINDOWS.clone()
    ids[2, 5] = VOCABULARY
    with pytest.raises(DataError, match=f"token id {VOCABULARY} is out of range"):
        collect(Hooked(tiny_model("llama")), ids, SETTINGS)

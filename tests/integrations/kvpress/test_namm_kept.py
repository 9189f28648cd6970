"""What a NAMM's choice is made from, without kvpress; `test_namm_press.py` has it at work."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partly
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as wholly

from tests.tiny import CONFIGS
from vesicle.errors import VesicleError
from vesicle.families import find_family
from vesicle.integrations.kvpress.namm_kept import Choice, filled, newest_attention, rotated
from vesicle.namm import Namm, NammSettings
from vesicle.namm.allotment import allot

LENGTH = 96


def choice(family: str, namm: Namm, memory: float = 0.5) -> Choice:
    config = CONFIGS[family]()
    return Choice(namm=namm, memory=memory, decoder=find_family(config).decoder_config(config))


def test_the_newest_queries_see_all_up_to_themselves():
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(4, 40, 12, generator=generator)
    keys = torch.randn(2, 40, 12, generator=generator)
    scores = 0.3 * queries @ keys.repeat_interleave(2, 0).transpose(1, 2)
    scores.masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1).unflatten(0, (2, 2)).mean(1)
    for w in (40, 32, 1):
        found = newest_attention(queries[:, -w:], keys, 0.3)
        assert np.abs(found - expected[:, -w:].numpy()).max() < 1e-6


@pytest.mark.parametrize(("function", "r"), [(wholly, 12), (partly, 6)])
def test_rotary_phases_are_those_of_transformers(function: object, r: int):
    generator = torch.Generator().manual_seed(4)
    queries, angles = (torch.randn(*size, generator=generator) for size in ((4, 9, 12), (9, r)))
    cosines, sines = angles.cos(), angles.sin()
    given = queries[None], queries[None], cosines[None], sines[None]
    expected, _ = function(*given)  # type: ignore[operator]  # one of two signatures
    assert torch.equal(rotated(queries, cosines, sines), expected[0])


def test_heads_get_their_parts_and_those_with_windows_none():
    settings = NammSettings(sinks=2, recent=16)
    profile = np.array([[-1, 0], [0, -0.5], [-2, -2]], np.float32)
    namm = replace(Namm.fresh(settings), profile=profile)
    keys = torch.zeros(2, LENGTH, 12)
    whole, windowed = choice("llama", namm), choice("gemma3", namm)
    found = [len(head) for layer in range(3) for head in whole.kept(layer, None, keys, keys)]
    assert found == allot(profile.ravel(), LENGTH / 2, LENGTH, 18)
    assert len(set(found)) >= 3
    assert [windowed.forgets(layer) for layer in range(3)] == [False, True, False]
    own = [len(head) for head in windowed.kept(1, None, keys, keys)]  # of its own layers alone
    assert own == allot(profile[1], LENGTH / 2, LENGTH, 18)


def test_what_is_first_and_newest_stays_whatever_the_scores():
    rng = np.random.default_rng(5)
    settings = NammSettings(network="linear", observes=32, sinks=3, recent=20)
    namm = Namm(settings=settings, parameters=rng.normal(size=19).astype(np.float32))
    queries, keys = torch.randn(4, 32, 12), torch.randn(2, LENGTH, 12)
    made = choice("llama", namm, 1 / 3)
    assert made.observes == 32
    kept = made.kept(0, queries, keys, keys)
    for positions in kept:
        row = positions.tolist()
        assert len(row) == 32
        assert row == sorted(set(row))
        assert {0, 1, 2, *range(LENGTH - 20, LENGTH)} <= set(row)


def test_a_profile_of_other_layers_is_refused():
    fitting = choice("llama", Namm.fresh()).decoder.shape
    with pytest.raises(VesicleError, match="profile of 2 layers of 2 KV heads; this model has 3"):
        choice("llama", Namm.fresh(shape=replace(fitting, n_layers=2)))


def test_heads_that_keep_fewer_are_filled_up_and_say_so():
    kept = [np.array([0, 3, 7], np.int32), np.array([1], np.int32)]
    places, hidden = filled(kept, 8)
    assert places.tolist() == [[0, 3, 7], [0, 1, 2]]
    assert hidden.tolist() == [[False] * 3, [True, False, True]]
    for head, own in enumerate(kept):
        assert places[head][~hidden[head]].tolist() == own.tolist()


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is here")
def test_without_kvpress_one_line_says_so():
    from vesicle.integrations.kvpress.namm_press import NAMMPress

    with pytest.raises(VesicleError, match=r"presses need kvpress, .* pip install 'vesicle\[kvp"):
        NAMMPress(memory=0.25)

"""Small decoders from scratch: a killed run goes on as if nothing had been, another is refused."""

import pytest
import torch

from vesicle.errors import VesicleError
from vesicle.scratch import DecoderSize, Recipe, draw, fit, learn_tokenizer, new_decoder
from vesicle.scratch.tokenizer import END

SIZE = DecoderSize(vocabulary=64, width=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn=32, context=32)
TOKENS = torch.arange(40 * 16).view(40, 16) % 7


def run(folder, recipe, model, stop_at=None):
    def loss_at(step):
        if step == stop_at:
            raise KeyboardInterrupt
        batch = TOKENS[draw(len(TOKENS), 4, step, seed=1)]
        return model(batch, labels=batch).loss

    return fit(model, loss_at, recipe, folder, facts={"seed": 1})


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    recipe = Recipe(steps=12, checkpoint_every=4)
    whole = new_decoder(SIZE, 0)
    losses = run(tmp_path / "whole", recipe, whole)
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", recipe, new_decoder(SIZE, 0), stop_at=9)
    resumed = new_decoder(SIZE, 5)  # what it begins with is in the checkpoint
    assert run(tmp_path / "cut", recipe, resumed) == losses
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_finished_run_is_not_repeated(tmp_path):
    recipe = Recipe(steps=3)
    first = new_decoder(SIZE, 0)
    losses = run(tmp_path, recipe, first)
    again = new_decoder(SIZE, 1)
    assert run(tmp_path, recipe, again, stop_at=0) == losses
    torch.testing.assert_close(again(TOKENS[:1]).logits, first(TOKENS[:1]).logits)
    with pytest.raises(VesicleError, match="another recipe"):
        run(tmp_path, Recipe(steps=4), again)


def test_every_pass_takes_every_item_once():
    taken = [i for step in range(5) for i in draw(10, 4, step, seed=3)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


def test_the_tokenizer_gives_back_the_text():
    tokenizer = learn_tokenizer(["Hello there, general.", "Über allem: ein Gruß."] * 9, 300)
    text = "there, Gruß ☺"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(END) == 0
    with pytest.raises(ValueError, match="vocabulary is 12; allowed: 257"):
        learn_tokenizer(["x"], 12)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="width is 16; allowed: multiples of 3"):
        DecoderSize(vocabulary=8, width=16, n_layers=1, n_heads=3, n_kv_heads=1, ffn=8, context=8)

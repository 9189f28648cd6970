"""The fast evaluation is what one pass a token and pattern gives, and the oracle is its least."""

import time

import pytest
import torch

from vesicle.duo import (
    THREE,
    TWO,
    Context,
    all_patterns,
    exhaustive,
    expected_best,
    make_duo,
    oracle_of,
    table,
    token_losses,
)
from vesicle.duo import context as context_module
from vesicle.duo.naive import measure
from vesicle.errors import VesicleError
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.scratch import DecoderSize, new_decoder

CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize(
    ("choices", "base"), [(TWO, FFN_BIG), (TWO, FFN_SMALL), (TWO, FFN_SKIP), (THREE, FFN_BIG)]
)
def test_the_tree_gives_what_passes_give(duo, text, choices, base, monkeypatch):
    monkeypatch.setattr("vesicle.duo.oracle.TOKENS", 5)  # several pieces of tokens,
    patterns = all_patterns(choices, 3)
    want = measure(*duo, text, patterns, base)
    pieces = list(exhaustive(Context(duo[0], text, base), choices, rows=20))  # and of patterns
    assert [len(at) for at, _ in pieces] == [5, 5, 2]
    for name in ("loss", "divergence"):
        found = torch.cat([getattr(measured, name) for _, measured in pieces], dim=1)
        torch.testing.assert_close(found, getattr(want, name), **CLOSE)
    assert want.loss.std(0).min() > 0.01  # patterns differ for every token


def test_given_patterns_are_evaluated_token_by_token(duo, text, context, monkeypatch):
    monkeypatch.setattr(context_module, "ROWS", 30)
    monkeypatch.setattr(context_module, "TOKENS", 5)
    patterns = all_patterns(THREE, 3)[::3]
    want = measure(*duo, text, patterns).loss
    torch.testing.assert_close(context.evaluate(patterns).loss, want, **CLOSE)
    drawn = torch.randint(len(patterns), (7, 12))
    found = context.evaluate(patterns[drawn]).loss
    torch.testing.assert_close(found, want.gather(0, drawn), **CLOSE)


def test_a_base_of_unlike_choices_is_the_models_own_pass(duo, text):
    model, choices = duo
    base = torch.randint(3, (12, 3))
    with torch.no_grad(), choices.by(table(base)):
        want = model(text[None, :-1]).logits[0]
    context = Context(model, text, base)
    torch.testing.assert_close(context.logits(base), want, **CLOSE)
    loss = context.evaluate(base[None]).loss[0]
    torch.testing.assert_close(loss, token_losses(want, text[1:]), **CLOSE)


def test_later_tokens_change_nothing(duo, text, context):
    other = text.clone()
    other[8:] = (other[8:] + 1) % 40
    patterns = all_patterns(TWO, 3)
    ours, theirs = (c.evaluate(patterns).loss for c in (context, Context(duo[0], other)))
    torch.testing.assert_close(ours[:, :7], theirs[:, :7], **CLOSE)
    assert (ours[:, 8:] - theirs[:, 8:]).abs().min() > 1e-4


@pytest.mark.parametrize("choices", [TWO, THREE])
def test_the_oracle_is_the_least_of_each_number(context, choices):
    found = oracle_of(context, choices, tries=(1, 5))
    patterns = all_patterns(choices, 3)
    measured = context.evaluate(patterns)
    n_big = (patterns == FFN_BIG).sum(-1)
    for k in range(4):
        group = n_big == k
        for best, by in ((found.labelled, "loss"), (found.unlabelled, "divergence")):
            least = getattr(measured, by)[group].min(0).values
            torch.testing.assert_close(getattr(best, by)[:, k], least, **CLOSE)
            assert ((best.patterns[:, k] == FFN_BIG).sum(-1) == k).all()
            again = context.evaluate(best.patterns[None, :, k])
            torch.testing.assert_close(best.loss[:, k], again.loss[0], **CLOSE)
            torch.testing.assert_close(best.divergence[:, k], again.divergence[0], **CLOSE)
        torch.testing.assert_close(found.random[1][:, k], measured.loss[group].mean(0), **CLOSE)
        assert (found.random[5][:, k] <= found.random[1][:, k] + 1e-6).all()
        assert (found.labelled.loss[:, k] <= found.random[5][:, k] + 1e-6).all()
    want = measured.loss.double().mean(1)
    torch.testing.assert_close(found.pattern_loss, want, **CLOSE)
    torch.testing.assert_close(found.small, measured.loss[(patterns == FFN_SMALL).all(-1)][0])


def test_the_expected_best_is_what_draws_give():
    losses = torch.tensor([[3.0], [1.0], [2.0], [7.0]])
    draws = torch.randint(4, (20000, 3), generator=torch.Generator().manual_seed(0))
    want = losses[draws, 0].min(1).values.mean().item()
    assert expected_best(losses, 3).item() == pytest.approx(want, abs=0.03)
    assert expected_best(losses, 1).item() == pytest.approx(3.25)
    assert expected_best(losses, 1000).item() == pytest.approx(1.0)


def test_patterns_come_in_rising_order():
    assert all_patterns(TWO, 2).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert len(all_patterns(THREE, 4)) == 81


def test_a_text_without_anything_to_predict_is_refused(duo, text):
    with pytest.raises(VesicleError, match="allowed: 2 tokens or more"):
        Context(duo[0], text[:1])


@pytest.mark.slow
def test_the_tree_is_ten_times_as_fast_as_passes(capsys):
    size = DecoderSize(
        vocabulary=512, width=64, n_layers=6, n_heads=4, n_kv_heads=2, ffn=256, context=96
    )
    model = new_decoder(size, 0)
    choices, text = make_duo(model), torch.randint(512, (97,))
    context, patterns = Context(model, text), all_patterns(TWO, 6)
    begun = time.perf_counter()
    list(exhaustive(context))
    tree_s = time.perf_counter() - begun
    at = torch.tensor([15, 47, 79])
    begun = time.perf_counter()
    measure(model, choices, text, patterns, positions=at)
    passes_s = (time.perf_counter() - begun) * 96 / len(at)
    with capsys.disabled():
        print(
            f"\n96 tokens, 64 patterns: tree {tree_s:.2f} s, passes {passes_s:.0f} s (3 tokens run)"
        )
    assert passes_s > 10 * tree_s

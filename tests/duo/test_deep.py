import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_windows
from vesicle.duo import (
    Context,
    always,
    deep_oracle,
    fixed_patterns,
    importance,
    make_duo_of,
    nested,
    own_ffns,
    replaced,
)
from vesicle.errors import ModelError, VesicleError
from vesicle.plan import FFN_BIG, FFN_SMALL


@pytest.fixture(scope="module")
def small():
    model = tiny_model()
    own = own_ffns(model)
    return nested(own, importance(model, own, tiny_windows(4).split(2)), 8)


@pytest.fixture(scope="module")
def duo(small):
    model = tiny_model()
    return model, make_duo_of(model, small)


@pytest.fixture
def texts():
    return [row[:17] for row in tiny_windows(3)]


def test_big_is_the_model_and_small_its_small_modules(duo, small, texts):
    plain, (model, choices) = tiny_model(), duo
    ids = texts[0][None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    with choices.by(always(FFN_SMALL)):
        found = model(ids).logits
    with replaced(plain, small, range(len(plain.model.layers))):
        torch.testing.assert_close(found, plain(ids).logits)


def test_what_is_found_is_what_it_costs(duo, texts):
    context = Context(duo[0], texts[0])
    targets = context.targets.clone()
    most = context.n_layers
    fixed = fixed_patterns([Context(duo[0], t) for t in texts[1:]], most)
    assert (fixed == FFN_SMALL).sum(1).tolist() == list(range(most + 1))
    found = deep_oracle(context, most, fixed, n_random=5, counts=(1, most))
    assert torch.equal(context.targets, targets)
    for patterns in (found.patterns, found.unlabelled_patterns):
        assert ((patterns == FFN_SMALL).sum(-1) == torch.arange(most + 1)).all()
    again = context.evaluate(found.patterns.transpose(0, 1))
    torch.testing.assert_close(again.loss.T, found.loss["labelled"])
    big = context.evaluate(torch.full((1, most), FFN_BIG)).loss[0]
    for loss in found.loss.values():
        torch.testing.assert_close(loss[:, 0], big)
    # With one small FFN the search is exhaustive.
    each = torch.full((most, most), FFN_BIG).fill_diagonal_(FFN_SMALL)
    alone = context.evaluate(each)
    torch.testing.assert_close(found.loss["labelled"][:, 1], alone.loss.min(0).values)
    nearest = alone.divergence.argmin(0)
    assert torch.equal((found.unlabelled_patterns[:, 1] == FFN_SMALL).int().argmax(1), nearest)
    # With all small there is one pattern.
    torch.testing.assert_close(found.random[1][:, 1], found.loss["fixed"][:, most])
    assert (found.random[10] <= found.random[1] + 1e-6).all()
    assert (found.difficulty >= 0).all()


def test_the_fixed_pattern_is_best_for_all_tokens_together(duo, texts):
    contexts = [Context(duo[0], t) for t in texts]
    fixed = fixed_patterns(contexts, 1)
    each = torch.full((contexts[0].n_layers,) * 2, FFN_BIG).fill_diagonal_(FFN_SMALL)
    total = torch.stack([c.evaluate(each).loss.sum(1) for c in contexts]).sum(0)
    assert torch.equal(fixed[1], each[total.argmin()])


def test_what_is_refused(duo, small):
    with pytest.raises(VesicleError, match="has small FFNs already"):
        make_duo_of(duo[0], small)
    other = tiny_model()
    other.config.model_type = "qwen2"
    with pytest.raises(ModelError, match="models of type 'llama'; this one is 'qwen2'"):
        make_duo_of(other, small)

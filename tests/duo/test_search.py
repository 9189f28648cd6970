"""Searches find what exhaustive search finds where they can, and count what they measure."""

import pytest
import torch

from vesicle.duo import TWO, all_patterns, beam, by_gains, greedy, oracle_of
from vesicle.plan import FFN_BIG, FFN_SMALL


def chain(n_layers, n_tokens, reach):
    """A cost of unlike gains in each layer, and of pairs up to `reach` layers apart."""
    rng = torch.Generator().manual_seed(1)
    gains = torch.randn(n_layers, n_tokens, generator=rng)
    pairs = torch.randn(n_layers, n_layers, n_tokens, generator=rng)

    def evaluate(patterns):
        chosen = patterns if patterns.dim() == 3 else patterns[:, None].expand(-1, n_tokens, -1)
        big = (chosen == FFN_BIG).float()
        cost = torch.einsum("ntl,lt->nt", big, gains) + 5
        for a in range(n_layers):
            for b in range(a + 1, min(n_layers, a + 1 + reach)):
                cost = cost + big[..., a] * big[..., b] * pairs[a, b]
        return cost

    return evaluate


def least(evaluate, n_layers, n_tokens):
    patterns = all_patterns(TWO, n_layers)
    cost, n_big = evaluate(patterns), (patterns == FFN_BIG).sum(-1)
    return torch.stack([cost[n_big == k].min(0).values for k in range(n_layers + 1)], dim=1)


@pytest.mark.parametrize("search", [greedy, beam, by_gains])
def test_independent_gains_are_found_by_all(search):
    evaluate = chain(6, 9, reach=0)
    found = search(evaluate, 6)
    torch.testing.assert_close(found.cost, least(evaluate, 6, 9), rtol=1e-5, atol=1e-5)
    assert ((found.patterns == FFN_BIG).sum(-1) == torch.arange(7)).all()


def test_gains_of_neighbours_are_found_by_dynamic_programming_alone():
    evaluate = chain(6, 40, reach=1)
    want = least(evaluate, 6, 40)
    torch.testing.assert_close(by_gains(evaluate, 6).cost, want, rtol=1e-5, atol=1e-5)
    assert (greedy(evaluate, 6).cost - want).max() > 0.1
    # Pairs further apart are not in its sum.
    far = chain(6, 40, reach=5)
    assert (by_gains(far, 6).cost - least(far, 6, 40)).max() > 0.1


def test_a_beam_of_all_patterns_is_exhaustive():
    evaluate = chain(6, 40, reach=5)
    want = least(evaluate, 6, 40)
    narrow, wide = greedy(evaluate, 6).cost, beam(evaluate, 6, width=2).cost
    assert (narrow - want).mean() > (wide - want).mean() > 0
    torch.testing.assert_close(beam(evaluate, 6, width=20).cost, want, rtol=1e-5, atol=1e-5)


def plain_beam(evaluate, n_layers, width, token):
    """The least costs of a beam of sets of big layers, for one token."""

    def cost(layers):
        pattern = torch.tensor([[FFN_BIG if n in layers else FFN_SMALL for n in range(n_layers)]])
        return evaluate(pattern)[0, token].item()

    kept, found = [frozenset()], [cost(())]
    for _ in range(n_layers):
        tried = {layers | {n} for layers in kept for n in set(range(n_layers)) - layers}
        kept = sorted(tried, key=cost)[:width]
        found.append(cost(kept[0]))
    return found


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_beam_keeps_patterns_that_differ(width):
    evaluate = chain(6, 15, reach=5)
    found = beam(evaluate, 6, width=width).cost
    for token in range(15):
        want = plain_beam(evaluate, 6, width, token)
        assert found[token].tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("search", [greedy, beam, by_gains])
def test_costs_are_those_of_the_patterns_of_a_model(context, search):
    evaluated = []

    def evaluate(patterns):
        evaluated.append(len(patterns))
        return context.evaluate(patterns).loss

    found = search(evaluate, 3, 2)
    assert found.evaluated == sum(evaluated)
    assert found.patterns.shape == (12, 3, 3)
    for k in range(3):
        again = context.evaluate(found.patterns[None, :, k]).loss[0]
        torch.testing.assert_close(found.cost[:, k], again, rtol=0, atol=1e-4)
    best = oracle_of(context).labelled.loss
    assert (found.cost >= best[:, :3] - 1e-4).all()
    assert (found.patterns[:, 0] == FFN_SMALL).all()
    if search is not by_gains:  # with one big FFN, all patterns are tried
        torch.testing.assert_close(found.cost[:, 1], best[:, 1], rtol=0, atol=1e-4)


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="budget is 7; allowed: 0 to 6"):
        greedy(chain(6, 2, 0), 6, 7)
    with pytest.raises(ValueError, match="width is 0"):
        beam(chain(6, 2, 0), 6, width=0)
    with pytest.raises(ValueError, match="63 layers; allowed: up to 62"):
        by_gains(chain(63, 2, 0), 63)

"""Routers: causal, trainable within a budget or after an oracle, and true to their dial."""

import pytest
import torch

from tests.duo.conftest import SIZE
from vesicle.duo import (
    Budgeted,
    DialRouter,
    ReadOutRouter,
    budget_loss,
    focal,
    oracle_loss,
    routed,
    share_matched,
    table,
)
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.scratch import Recipe, fit

ROUTERS = [
    lambda skips: ReadOutRouter(SIZE.n_layers, SIZE.width, skips=skips),
    lambda skips: ReadOutRouter(SIZE.n_layers, SIZE.width, hidden=4, skips=skips),
    lambda skips: DialRouter(SIZE.n_layers, SIZE.width, hidden=4, skips=skips),
]
TEXTS = torch.randint(SIZE.vocabulary, (6, 17), generator=torch.Generator().manual_seed(2))
DIAL = torch.tensor([0.5, 0.5])


def scattered(make, skips=False):
    router, rng = make(skips), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.5)
    return router


@pytest.mark.parametrize("make", ROUTERS)
@pytest.mark.parametrize("skips", [False, True])
def test_choices_are_causal(duo, make, skips):
    router = scattered(make, skips)
    other = TEXTS[:2].clone()
    other[:, 10:] = (other[:, 10:] + 1) % SIZE.vocabulary
    (logits, taken), (others, theirs) = (
        routed(*duo, router, texts, 0.5) for texts in (TEXTS[:2], other)
    )
    assert torch.equal(taken[:, :10], theirs[:, :10])
    _, begun = routed(*duo, router, TEXTS[:2, :10], 0.5)
    assert torch.equal(taken[:, :10], begun)
    torch.testing.assert_close(logits[:, :10], others[:, :10], rtol=1e-4, atol=1e-4)
    assert not torch.equal(taken[:, 10:], theirs[:, 10:])
    allowed = {FFN_SKIP, FFN_SMALL, FFN_BIG} if skips else {FFN_SMALL, FFN_BIG}
    assert set(taken.unique().tolist()) == allowed


@pytest.mark.parametrize("make", ROUTERS)
@pytest.mark.parametrize("skips", [False, True])
def test_soft_routing_becomes_hard_as_it_cools(make, skips):
    router, x = scattered(make, skips), torch.randn(2, 50, SIZE.width)
    hot, cold = (router.probabilities(1, x, DIAL, t) for t in (2.0, 1e-3))
    for p in (hot, cold):
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 50))
        assert (p >= 0).all()
    assert skips or (hot[..., FFN_SKIP] == 0).all()
    taken = router.choose(1, x, DIAL, 0.0)
    sure = cold.max(-1).values > 0.99
    assert sure.float().mean() > 0.9
    assert torch.equal(cold.argmax(-1)[sure], taken[sure])
    assert hot.max(-1).values.mean() < 0.9


@pytest.mark.parametrize("make", ROUTERS)
def test_the_budget_is_kept_and_only_the_router_learns(duo, make, tmp_path):
    model, choices = duo
    before = {name: p.clone() for name, p in model.named_parameters()}
    router, how = make(False), Budgeted(steps=60, budgets=(0.3,), weight=100.0)
    loss_at = budget_loss(model, choices, router, TEXTS, how, batch=3)
    assert loss_at(2).item() == loss_at(2).item()
    losses = fit(router, loss_at, Recipe(steps=60, learning_rate=3e-2), tmp_path)
    assert losses[-1] < losses[0]
    dial = torch.full((len(TEXTS),), 0.3)
    with torch.no_grad(), choices.by(router.soft(dial, 0.2)) as taken:
        model(TEXTS)
    share = torch.stack([p[..., FFN_BIG] for p in taken.values()]).mean().item()
    assert share == pytest.approx(0.3, abs=0.05)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None, name


def test_focal_loss_is_as_written():
    p = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.1, 0.9]])
    found = focal(p, torch.tensor([1, 2]), 2.0)
    want = torch.tensor([-(0.7**2) * torch.log(torch.tensor(0.3)), 0.01 * 0.105360516])
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(focal(p, torch.tensor([1, 2]), 0.0)[0], -p[0, 1].log())


def test_an_oracle_is_followed_where_its_own_choices_lead(duo):
    model, choices = duo
    inputs, router = TEXTS[:2, :-1], scattered(ROUTERS[0])
    patterns = torch.randint(1, 3, (*inputs.shape, SIZE.n_layers))
    seen = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), choices.by(table(patterns)):
        model(inputs)
    for hook in hooks:
        hook.remove()
    want = [
        focal(router.probabilities(n, x, DIAL, 1.0), patterns[..., n], 2.0).mean()
        for n, x in seen.items()
    ]
    loss_at = oracle_loss(model, choices, router, inputs, patterns, dial=0.5, batch=2)
    torch.testing.assert_close(loss_at(0), torch.stack(want).mean())


def test_a_router_learns_an_oracle_that_it_can_know(duo, tmp_path):
    # Big in the first layer where the token is even, in the others nowhere.
    inputs = TEXTS[:, :-1]
    patterns = torch.full((*inputs.shape, SIZE.n_layers), FFN_SMALL)
    patterns[..., 0] = torch.where(inputs % 2 == 0, FFN_BIG, FFN_SMALL)
    router = ReadOutRouter(SIZE.n_layers, SIZE.width, hidden=32)
    loss_at = oracle_loss(*duo, router, inputs, patterns, dial=1 / 6, batch=6)
    _, before = routed(*duo, router, inputs, 1 / 6)
    fit(router, loss_at, Recipe(steps=60, learning_rate=5e-2), tmp_path)
    _, taken = routed(*duo, router, inputs, 1 / 6)
    agrees = [(found == patterns).float().mean().item() for found in (before, taken)]
    assert agrees[1] > 0.95 > agrees[0]


@pytest.mark.parametrize("make", ROUTERS)
def test_leaning_spends_what_is_asked_for(duo, make):
    router = scattered(make)
    for share in (0.25, 0.6):
        lean = share_matched(*duo, router, TEXTS, share)
        _, taken = routed(*duo, router, TEXTS, share, lean)
        assert (taken == FFN_BIG).float().mean().item() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("skips", [False, True])
def test_a_dial_of_one_is_all_big_and_levels_have_their_steps(duo, skips):
    router = scattered(ROUTERS[2], skips)
    _, taken = routed(*duo, router, TEXTS, 1.0)
    assert (taken == FFN_BIG).all()
    one = torch.ones(2)
    soft = router.probabilities(0, torch.randn(2, 5, SIZE.width), one, 2.0)
    assert (soft[..., FFN_BIG] == 1).all()
    fresh, x = ROUTERS[2](skips), torch.randn(1, 5, SIZE.width)
    for dial, want in (
        (0.7, FFN_BIG),
        (0.55, FFN_SMALL if skips else FFN_BIG),
        (0.4, FFN_SMALL),
        (0.2, FFN_SKIP if skips else FFN_SMALL),
    ):
        # Before it has learnt, and at position 15, every level is the dial.
        assert (fresh.choose(0, x, torch.tensor([dial]), 0.0) == want).all(), dial


def test_budgets_are_drawn_for_each_text_and_temperatures_fall():
    how = Budgeted(steps=5, budgets=(0.2, 0.8), hottest=2.0, coldest=0.125)
    drawn = torch.stack([how.dials(4, step, seed=0) for step in range(100)])
    assert drawn.min() > 0.2
    assert drawn.max() < 0.8
    assert len(drawn.unique()) == 400
    assert [how.temperature(step) for step in range(5)] == pytest.approx([2, 1, 0.5, 0.25, 0.125])
    with pytest.raises(ValueError, match=r"budgets are \(0,\)"):
        Budgeted(steps=5, budgets=(0,))
    with pytest.raises(ValueError, match=r"temperatures are 0.1 to 0.2"):
        Budgeted(steps=5, budgets=(0.5,), hottest=0.1)

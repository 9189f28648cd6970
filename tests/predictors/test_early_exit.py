"""Early exit: tokens leave at the first layer that is confident enough, and exits are trained."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from tests.parity.test_soft import hard, soft
from tests.predictors.test_adaptive_computation_time import CONFIG, TOLERANCE, depth_modulator
from tests.predictors.test_predictors import D, L, hidden, released
from tests.tiny import tiny_model, tokens
from vesicle.cost import price_dense
from vesicle.plan import FFN_BIG, FFN_SKIP
from vesicle.predictors import PredictorConfig
from vesicle.predictors.early_exit import EarlyExit
from vesicle.training.early_exit import early_exit_loss
from vesicle.transmitters import index

DIALS = (0.1, 0.3, 0.6, 0.9)


def exits(model: Any, ids: Tensor) -> list[Tensor]:
    """The residual stream (B, T, D) after each layer's attention."""
    found: list[Tensor] = []
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: found.append(args[0])
        )
        for layer in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("value", DIALS)
def test_a_token_exits_where_it_is_more_confident_than_the_dial(calm: EarlyExit, value: float):
    x = hidden()
    confident = torch.stack([calm.confidence(l, x[l]) for l in range(L)], -1).sigmoid() > value
    levels = released(calm, x, value)[..., 0]  # (B, T, L)
    assert torch.equal(levels < 0.5, confident.cummax(-1).values)
    assert (levels.diff(dim=-1) <= 0).all()
    assert 0.02 < confident[..., 0].double().mean() < 0.98


@pytest.mark.parametrize("value", [0.05, 0.6, 1.0])
def test_gradients_are_finite(calm: EarlyExit, value: float):
    (released(calm, hidden(), value) ** 2).sum().backward()
    for name, parameter in calm.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert value == 1 or (parameter.grad != 0).all(), name


def test_tokens_skip_all_that_follows_their_exit(llama: Any, calm: EarlyExit):
    modulator, costs = depth_modulator(llama, calm), []
    for dial in (*DIALS, 1.0):
        _, run = hard(llama, modulator, tokens(40), dial)
        left = run.levels[0][..., index("serotonin")] < 0.5  # (T, L)
        assert (left[:, 1:] >= left[:, :-1]).all()
        assert ((run.plan.ffn == FFN_SKIP) == left).all()
        assert ((run.plan.ffn == FFN_BIG) == ~left).all()
        assert ((run.plan.attention[:, 1:] == 0) == left[:, :-1]).all()
        costs.append(run.cost.flops_total)
    assert costs == sorted(set(costs))
    assert costs[-1] == price_dense(run.shape, 40).flops_total


@pytest.mark.parametrize("layer", range(L))
def test_the_head_reads_the_state_at_the_exit(llama: Any, layer: int):
    calm, ids = EarlyExit(CONFIG).double(), tokens(40)
    with torch.no_grad():
        calm.offset.fill_(-9.0)[layer] = 9.0
        expected = llama.lm_head(llama.model.norm(exits(llama, ids)[layer]))
    logits, _ = hard(llama, depth_modulator(llama, calm), ids, 0.5)
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dial", DIALS)
def test_straight_through_is_the_hard_run(llama: Any, calm: EarlyExit, dial: float):
    modulator, ids = depth_modulator(llama, calm), tokens(40)
    first, run = hard(llama, modulator, ids, dial)
    second, cold = soft(llama, modulator, ids, 0.0, dial)
    assert (first - second).abs().max() < TOLERANCE
    assert cold.soft_cost is not None
    share = run.cost.flops_total / price_dense(run.shape, 40).flops_total
    assert cold.soft_cost.share.item() == pytest.approx(share, abs=1e-12)
    assert share < 1


@pytest.mark.parametrize("transmitters", [("gaba",), ("serotonin", "dopamine")])
def test_other_transmitters_are_refused(transmitters: tuple[str, ...]):
    config = PredictorConfig(n_layers=L, width=D, transmitters=transmitters)
    with pytest.raises(ValueError, match=f"{transmitters[-1]}; 'calm' releases serotonin alone"):
        EarlyExit(config)


def test_counted_work(calm: EarlyExit):
    assert calm.flops == 2 * D
    assert calm.weights_read == D + 1


# Training ---------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Any:
    """A model whose weights take gradients of their own."""
    return tiny_model("llama")


def some(ids: Tensor) -> Tensor:
    """Which targets count: not the first of a text, which none can; by chance else."""
    scored = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    scored[:, 0] = True
    return scored


def test_the_loss_is_that_of_the_formula(own: Any, calm: EarlyExit):
    ids = tokens(30, batch=2)
    scored = some(ids)
    counted = scored[:, 1:]
    states, wanted = exits(own, ids), ids[:, 1:][counted]
    logits = [own.lm_head(own.model.norm(x)) for x in states] + [own(ids).logits]
    named = [x[:, :-1][counted].argmax(-1) for x in logits]
    losses = [cross_entropy(x[:, :-1][counted], wanted) for x in logits]
    model_term = sum(i * loss for i, loss in enumerate(losses, 1)) / sum(range(1, L + 2))
    missed = [
        binary_cross_entropy_with_logits(
            calm.confidence(l, states[l].detach())[:, :-1][counted], (named[l] == named[-1]) * 1.0
        )
        for l in range(L)
    ]
    expected = model_term + torch.stack(missed).mean()
    loss = early_exit_loss(own, calm, ids, scored)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = [*calm.parameters(), *own.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_classifiers_do_not_move_the_model(own: Any, calm: EarlyExit):
    ids = tokens(30)
    grads = []
    for factor in (1.0, 5.0):
        with torch.no_grad():
            calm.weight *= factor
        own.zero_grad()
        early_exit_loss(own, calm, ids, some(ids)).backward()
        grads.append([p.grad.clone() for p in own.parameters()])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_a_frozen_model_has_its_classifiers_trained(llama: Any):
    ids, calm = tokens(60), EarlyExit(CONFIG)
    before = llama(ids).logits
    optimizer = torch.optim.Adam(calm.parameters(), lr=0.05)
    wanted = [p.requires_grad for p in llama.parameters()]
    llama.requires_grad_(False)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = early_exit_loss(llama, calm, ids, torch.ones_like(ids, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for parameter, grad in zip(llama.parameters(), wanted, strict=True):
        parameter.requires_grad_(grad)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(llama(ids).logits, before)  # and no hook is left


def test_without_a_target_there_is_no_loss(llama: Any, calm: EarlyExit):
    ids = tokens(10)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, 0] = True
    with pytest.raises(ValueError, match="scored marks no target"):
        early_exit_loss(llama, calm, ids, scored)

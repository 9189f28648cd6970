"""Mixture of depths: the top k of a sequence in training, a causal read-out in all else."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.test_soft import hard, soft
from tests.predictors.test_adaptive_computation_time import CONFIG, TOLERANCE, depth_modulator
from tests.predictors.test_predictors import B, D, L, T, hidden, released
from tests.tiny import perturb, tokens
from vesicle.cost import price_dense
from vesicle.plan import FFN_SKIP
from vesicle.predictors import PredictorConfig
from vesicle.predictors.mixture_of_depths import MixtureOfDepths
from vesicle.reference.attach import attach

DIALS = (0.55, 0.7, 0.8, 0.9)
POSITIONS = torch.arange(T).expand(B, T)


@pytest.fixture
def mod() -> MixtureOfDepths:
    torch.manual_seed(0)
    predictor = MixtureOfDepths(CONFIG)
    perturb(predictor)
    return predictor.double().eval()


def test_dial_one_is_rest_whatever_was_learnt(mod: MixtureOfDepths):
    for training in (False, True):
        mod.train(training)
        assert (released(mod, hidden(), 1.0) == 1).all()
    assert mod.auxiliary().item() == 0
    assert (released(mod.float(), 1000 * hidden(), 1.0) == 1).all()


@pytest.mark.parametrize("t", [0, 63, 100])
@pytest.mark.parametrize("training", [False, True])
def test_causal_where_no_gradients_are_recorded(mod: MixtureOfDepths, training: bool, t: int):
    mod.train(training)
    x = hidden()
    other = x.clone()
    other[:, :, t + 1 :] = hidden(1)[:, :, t + 1 :]
    with torch.no_grad():
        assert torch.equal(released(mod, x)[:, : t + 1], released(mod, other)[:, : t + 1])


@pytest.mark.parametrize("cuts", [(1,), (17, 40, 129), tuple(range(1, T))])
def test_pieces_agree_with_the_whole(mod: MixtureOfDepths, cuts: tuple[int, ...]):
    torch.testing.assert_close(
        released(mod, hidden(), cuts=cuts), released(mod, hidden()), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("training", [False, True])
def test_rows_agree_with_the_whole(mod: MixtureOfDepths, training: bool):
    x, whole = hidden(), released(mod, hidden()).detach()
    mod.train(training)
    for t in range(20):
        for layer in range(L):
            row = mod.release_row(layer, x[layer, 0, t], t, 0.6, {})
            assert row == pytest.approx(whole[0, t, layer].numpy(), abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_sequences_of_a_batch_do_not_meet(mod: MixtureOfDepths, training: bool):
    mod.train(training)
    x = hidden()
    other = x.clone()
    other[:, 1] = hidden(1)[:, 1]
    assert torch.equal(released(mod, x)[0], released(mod, other)[0])
    mixed = mod.release(1, x[1], POSITIONS, torch.tensor([0.6, 0.9]), {})
    for row, value in enumerate((0.6, 0.9)):
        assert torch.equal(mixed[row], released(mod, x, value)[row, :, 1])


def test_levels_rise_with_the_dial(mod: MixtureOfDepths):
    at = [released(mod, hidden(), value)[:, :, 1] for value in (*DIALS, 1.0)]
    for low, high in pairwise(at):
        assert (low < high).all()
        assert (low >= 0.5).double().mean() < (high >= 0.5).double().mean()


@pytest.mark.parametrize("value", [0.3, *DIALS, 0.999])
def test_the_top_k_run_while_training(mod: MixtureOfDepths, value: float):
    x = hidden()
    levels = released(mod.train(), x, value)[..., 0]  # (B, T, L)
    capacity = max(1 / 16, 1 - 2 * (1 - value))
    assert ((levels[..., 1] >= 0.5).sum(1) == round(capacity * T)).all()
    assert (levels[..., ::2] == 1).all()
    r = torch.nn.functional.rms_norm(x[1], (D,), eps=1e-6) @ mod.router[1, 0]
    runs = levels[..., 1] >= 0.5
    for row in range(B):
        assert runs[row].all() or r[row][runs[row]].min() > r[row][~runs[row]].max()


def test_at_least_one_token_runs(mod: MixtureOfDepths):
    levels = mod.train().release(1, hidden()[1, :, :3], POSITIONS[:, :3], torch.full((B,), 0.1), {})
    assert ((levels >= 0.5).sum(1) == 1).all()


def test_the_auxiliary_loss_is_the_latest_training_passs(mod: MixtureOfDepths):
    assert mod.auxiliary().item() == 0
    released(mod, hidden())
    assert mod.auxiliary().item() == 0
    mod.train()
    losses = []
    for x in (hidden(), hidden(), hidden(1)):
        released(mod, x)
        losses.append(mod.auxiliary().item())
    assert 0 < losses[0] == losses[1] != losses[2]
    with torch.no_grad():
        released(mod, hidden())
    assert mod.auxiliary().item() == losses[2]


def test_the_auxiliary_loss_trains_the_causal_read_out_alone(mod: MixtureOfDepths):
    x = hidden().requires_grad_()
    released(mod.train(), x)
    mod.auxiliary().backward()
    assert x.grad is None
    assert mod.router.grad is None
    for parameter in (mod.weight, mod.offset, mod.log_slope, mod.position_weight):
        assert parameter.grad is not None
        assert (parameter.grad[1] != 0).all()


def test_the_causal_read_out_learns_which_tokens_are_among_the_top_k():
    torch.manual_seed(0)
    mod = MixtureOfDepths(PredictorConfig(n_layers=4, width=16, transmitters=("serotonin",)))
    x, positions = torch.randn(4, 3, 120, 16), torch.arange(120).expand(3, -1)

    def levels(at: float) -> Tensor:
        dial, state = torch.full((3,), at), dict[int, Tensor]()
        found = [mod.release(l, x[l], positions, dial, state) for l in range(4)]
        return torch.cat(found, dim=-1)

    dials = (0.6, 0.75, 0.9)
    optimizer = torch.optim.Adam(mod.parameters(), lr=0.1)
    for step in range(90):
        levels(dials[step % 3])
        optimizer.zero_grad()
        mod.auxiliary().backward()
        optimizer.step()
    for dial in dials:
        chosen, foreseen = (mod.train(mode) and levels(dial) >= 0.5 for mode in (True, False))
        assert (chosen == foreseen)[..., 1::2].double().mean() > 0.9


@pytest.mark.parametrize("value", [0.6, 1.0])
def test_gradients_are_finite(mod: MixtureOfDepths, value: float):
    (released(mod.train(), hidden(), value) ** 2).sum().backward()
    assert mod.router.grad is not None
    assert torch.isfinite(mod.router.grad).all()
    assert bool((mod.router.grad[1] != 0).all()) == (value < 1)


def test_skipped_tokens_skip_a_block(llama: Any, mod: MixtureOfDepths):
    modulator, costs = depth_modulator(llama, mod), []
    for dial in (*DIALS, 1.0):
        _, run = hard(llama, modulator, tokens(40), dial)
        assert (run.plan.ffn[:, ::2] != FFN_SKIP).all()
        assert ((run.plan.ffn[:, 1] == FFN_SKIP) == (run.plan.attention[:, 2] == 0)).all()
        assert (run.plan.attention[:, :2] == 1).all()
        costs.append(run.cost.flops_total)
    assert costs == sorted(set(costs))
    assert costs[-1] == price_dense(run.shape, 40).flops_total


@pytest.mark.parametrize("dial", DIALS)
def test_straight_through_is_the_hard_run(llama: Any, mod: MixtureOfDepths, dial: float):
    modulator, ids = depth_modulator(llama, mod), tokens(40)
    first, run = hard(llama, modulator, ids, dial)
    second, cold = soft(llama, modulator, ids, 0.0, dial)
    assert (first - second).abs().max() < TOLERANCE
    assert cold.soft_cost is not None
    share = run.cost.flops_total / price_dense(run.shape, 40).flops_total
    assert cold.soft_cost.share.item() == pytest.approx(share, abs=1e-12)
    assert share < 1


def test_gradients_reach_routers_through_soft_execution(llama: Any, mod: MixtureOfDepths):
    logits, _ = soft(llama, depth_modulator(llama, mod).train(), tokens(40), 0.0, 0.75)
    logits.square().mean().backward()
    assert mod.router.grad is not None
    assert (mod.router.grad[1] != 0).all()
    assert mod.weight.grad is None
    assert mod.auxiliary().item() > 0


def test_authors_are_causal_although_training(llama: Any, mod: MixtureOfDepths):
    ids, modulator = tokens(40), depth_modulator(llama, mod)
    expected = hard(llama, modulator.eval(), ids, 0.75)[1].plan.rows
    with attach(llama, modulator.train(), 0.75) as run:
        llama(ids)
    assert (run.plan.rows == expected).all()


@pytest.mark.parametrize("transmitters", [("gaba",), ("serotonin", "dopamine")])
def test_other_transmitters_are_refused(transmitters: tuple[str, ...]):
    config = PredictorConfig(n_layers=L, width=D, transmitters=transmitters)
    with pytest.raises(ValueError, match=f"{transmitters[-1]}; 'mod' releases serotonin alone"):
        MixtureOfDepths(config)


def test_counted_work():
    config = PredictorConfig(n_layers=4, width=D, transmitters=("serotonin",))
    assert MixtureOfDepths(config).flops == D  # 2 D in every second layer
    assert MixtureOfDepths(config).weights_read == (D + 3) // 2

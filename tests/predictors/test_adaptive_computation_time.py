"""Adaptive computation time: tokens halt by a sum over layers, for good, and skip what follows."""

from typing import Any

import pytest
import torch

from tests.parity.test_soft import hard, soft
from tests.predictors.test_predictors import B, D, L, T, hidden, released
from tests.tiny import shape_of, tokens
from vesicle.cost import price_dense
from vesicle.effectors import SerotoninDepth
from vesicle.modulator import Modulator
from vesicle.modulator.info import ModulatorInfo
from vesicle.plan import FFN_BIG, FFN_SKIP
from vesicle.predictors import Predictor, PredictorConfig
from vesicle.predictors.adaptive_computation_time import AdaptiveComputationTime
from vesicle.transmitters import index

CONFIG = PredictorConfig(n_layers=L, width=D, transmitters=("serotonin",))
DIALS = (0.1, 0.3, 0.6, 0.9)
TOLERANCE = 1e-10
"""Of logits in fp64: no soft attention scores, which are fp32, where GABA is not released."""


def depth_modulator(model: Any, predictor: Predictor) -> Modulator:
    """One under which a level below 1/2 skips the FFN and the next attention."""
    skips = SerotoninDepth(ffn_below=0.5, attention_below=0.5, bypass_below=0.5)
    info = ModulatorInfo(model_name="tiny", model=shape_of(model).fingerprint())
    return Modulator(predictor, {"serotonin": skips}, info)


def test_an_untrained_one_halts_nothing_in_few_layers():
    assert (released(AdaptiveComputationTime(CONFIG), hidden(), 0.5) > 0.5).all()


def test_a_token_halts_where_the_sum_of_deficits_says_so(act: AdaptiveComputationTime):
    x, positions = hidden(), torch.arange(T).expand(B, T)
    levels = released(act, x)[..., 0]  # (B, T, L)
    dial = torch.full((B,), 0.6)
    halting = torch.stack(
        [1 - Predictor.release(act, l, x[l], positions, dial, {})[..., 0] for l in range(L)], dim=-1
    )
    halted = halting.cumsum(-1) > 0.99
    assert torch.equal(levels < 0.5, halted)
    assert (levels.diff(dim=-1) < 0).all()
    assert 0.1 < halted[..., 1].double().mean() < halted[..., 2].double().mean() < 0.9


def test_gradients_are_finite(act: AdaptiveComputationTime):
    for value in (0.05, 0.6, 1.0):
        act.zero_grad()
        (released(act, hidden(), value) ** 2).sum().backward()
        for name, parameter in act.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert value == 1 or (parameter.grad != 0).all(), name


def test_halted_tokens_skip_all_that_follows(llama: Any, act: AdaptiveComputationTime):
    modulator, costs = depth_modulator(llama, act), []
    for dial in (*DIALS, 1.0):
        _, run = hard(llama, modulator, tokens(40), dial)
        halted = run.levels[0][..., index("serotonin")] < 0.5  # (T, L)
        assert (halted[:, 1:] >= halted[:, :-1]).all()
        assert ((run.plan.ffn == FFN_SKIP) == halted).all()
        assert ((run.plan.ffn == FFN_BIG) == ~halted).all()
        assert ((run.plan.attention[:, 1:] == 0) == halted[:, :-1]).all()
        assert (run.plan.attention[:, 0] == 1).all()
        costs.append(run.cost.flops_total)
    assert costs == sorted(set(costs))
    assert costs[-1] == price_dense(run.shape, 40).flops_total


@pytest.mark.parametrize("dial", DIALS)
def test_straight_through_is_the_hard_run(llama: Any, act: AdaptiveComputationTime, dial: float):
    modulator, ids = depth_modulator(llama, act), tokens(40)
    first, run = hard(llama, modulator, ids, dial)
    second, cold = soft(llama, modulator, ids, 0.0, dial)
    assert (first - second).abs().max() < TOLERANCE
    assert cold.soft_cost is not None
    share = run.cost.flops_total / price_dense(run.shape, 40).flops_total
    assert cold.soft_cost.share.item() == pytest.approx(share, abs=1e-12)
    assert share < 1


def test_gradients_reach_halting_units_of_an_untrained_one(llama: Any):
    act = AdaptiveComputationTime(CONFIG).double()
    logits, run = soft(llama, depth_modulator(llama, act), tokens(20), 0.0)
    assert run.soft_cost is not None
    (logits.square().mean() + run.soft_cost.share).backward()
    assert act.weight.grad is not None
    assert (act.weight.grad != 0).all()


@pytest.mark.parametrize("transmitters", [("gaba",), ("serotonin", "dopamine")])
def test_other_transmitters_are_refused(transmitters: tuple[str, ...]):
    config = PredictorConfig(n_layers=L, width=D, transmitters=transmitters)
    with pytest.raises(ValueError, match=f"{transmitters[-1]}; 'act' releases serotonin alone"):
        AdaptiveComputationTime(config)


def test_counted_work(act: AdaptiveComputationTime):
    assert act.flops == 2 * D
    assert act.weights_read == D + 3

"""Soft execution: straight-through is the hard run, its cost is the ledger's, and it learns."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import TRANSMITTERS, shape_of, tiny_model, tiny_modulator, tokens
from vesicle.cost import price, price_dense
from vesicle.modulator import Modulator
from vesicle.plan import visible_blocks
from vesicle.predictors import PREDICTORS
from vesicle.reference.attach import Run, Soft, attach
from vesicle.shapes import ModelShape, Overhead

TOLERANCE = 1e-5
"""Of logits, about 2 in size: soft attention scores are fp32."""

RELEASED = [(name,) for name in TRANSMITTERS] + [TRANSMITTERS]


def hard(model: Any, modulator: Modulator, ids: Tensor, budget: float = 0.6) -> tuple[Tensor, Run]:
    with torch.no_grad(), attach(model, modulator, budget) as run:
        return model(ids).logits, run


def soft(
    model: Any, modulator: Modulator, ids: Tensor, heat: float, budget: float = 0.6
) -> tuple[Tensor, Run]:
    with attach(model, modulator, budget, soft=Soft(temperature=heat)) as run:
        return model(ids).logits, run


@pytest.mark.parametrize("released", RELEASED, ids="+".join)
def test_straight_through_is_the_hard_run(family: str, ids: Tensor, released: tuple[str, ...]):
    model = tiny_model(family)
    modulator = tiny_modulator(
        shape_of(model), "recurrent", transmitters=released, bypass_below=0.2
    )
    first, _ = hard(model, modulator, ids)
    second, _ = soft(model, modulator, ids, 0.0)
    difference = (first - second).abs()
    assert difference.max() < TOLERANCE, f"max {difference.max():.2e} mean {difference.mean():.2e}"
    assert (first - model(ids).logits).abs().mean() > 0.02


@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_straight_through_with_eager_attention_and_either_summary(ids: Tensor, summary: str):
    model = tiny_model("qwen2", attention="eager")
    modulator = tiny_modulator(shape_of(model), summary=summary)
    difference = hard(model, modulator, ids)[0] - soft(model, modulator, ids, 0.0)[0]
    assert difference.abs().max() < 10 * TOLERANCE


@pytest.mark.parametrize("heat", [0.0, 0.3])
def test_rest_is_rest(model: Any, ids: Tensor, heat: float):
    logits, run = soft(model, tiny_modulator(shape_of(model)), ids, heat, budget=1.0)
    assert (logits - model(ids).logits).abs().max() < TOLERANCE
    assert run.soft_cost is not None
    assert run.soft_cost.share.item() == 1.0


@pytest.mark.parametrize("released", [("serotonin",), ("gaba",)], ids="+".join)
def test_cold_masks_are_the_hard_run(llama: Any, ids: Tensor, released: tuple[str, ...]):
    """Not dopamine: at its threshold lies a channel, whose mask stays one half."""
    modulator = tiny_modulator(shape_of(llama), transmitters=released)
    first, _ = hard(llama, modulator, ids)
    gaps = [
        (soft(llama, modulator, ids, heat)[0] - first).abs().mean().item()
        for heat in (0.3, 0.03, 1e-6)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def rounding(shape: ModelShape, overhead: Overhead, n_tokens: int) -> tuple[float, float]:
    """FLOPs by which ceilings can raise the hard cost, and by which not choosing can lower it."""
    outputs, later = shape.site_outputs, shape.n_layers - 1
    blocks = visible_blocks(np.arange(n_tokens, dtype=np.int32))
    several = int((blocks > 2).sum())  # others read every block there is
    channels = n_tokens * (
        later * 2 * (outputs[0] + outputs[1]) + shape.n_layers * 2 * (outputs[2] + outputs[3])
    )
    choosing = 2 * overhead.selection_vectors * shape.query_width * int((blocks - 1).sum())
    return channels + several * later * 4 * shape.query_width * 16, later * choosing


@pytest.mark.parametrize("bypass_below", [0.0, 0.2])
@pytest.mark.parametrize("released", RELEASED, ids="+".join)
def test_soft_cost_is_the_ledgers(
    model: Any, ids: Tensor, released: tuple[str, ...], bypass_below: float
):
    modulator = tiny_modulator(
        shape_of(model), transmitters=released, bypass_below=bypass_below, summary="bounds"
    )
    _, run = soft(model, modulator, ids, 0.0)
    assert run.soft_cost is not None
    plan = hard(model, modulator, ids)[1].plan
    overhead = run.method.overhead(run.shape)
    executed = price(plan, run.shape, overhead).flops_total
    dense = price_dense(run.shape, 70).flops_total
    assert run.soft_cost.dense.sum().item() == dense
    up, down = rounding(run.shape, overhead, 70)
    difference = executed - run.soft_cost.executed.sum().item()
    assert -down <= difference <= up
    assert run.soft_cost.share.item() == pytest.approx(executed / dense, abs=(up + down) / dense)
    if released == ("serotonin",):  # nothing is rounded
        assert difference == pytest.approx(0, abs=1e-3)
    assert executed != dense


def test_soft_cost_of_a_batch(llama: Any, modulator: Modulator):
    batch = tokens(40, batch=2)
    _, both = soft(llama, modulator, batch, 0.0)
    costs = [soft(llama, modulator, batch[i : i + 1], 0.0)[1].soft_cost for i in range(2)]
    assert both.soft_cost is not None
    for i, cost in enumerate(costs):
        assert cost is not None
        torch.testing.assert_close(both.soft_cost.executed[i], cost.executed[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("heat", [0.0, 0.2])
@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_gradients_reach_every_parameter(model: Any, ids: Tensor, kind: str, heat: float):
    modulator = tiny_modulator(shape_of(model), kind)
    model.requires_grad_(False)
    logits, run = soft(model, modulator, ids, heat)
    assert run.soft_cost is not None
    last = modulator.predictor.config.n_layers - 1
    for loss in (logits.logsumexp(-1).mean(), run.soft_cost.share):
        modulator.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in modulator.predictor.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            for layer in range(last + 1):
                assert (parameter.grad[layer] != 0).any(), f"{name} of layer {layer}"
    assert modulator.ffn_standin.down.grad is None


@pytest.mark.parametrize("name", TRANSMITTERS)
def test_the_cost_pulls_each_level_down(llama: Any, ids: Tensor, name: str):
    modulator = tiny_modulator(shape_of(llama), transmitters=(name,))
    _, run = soft(llama, modulator, ids, 0.0)
    assert run.soft_cost is not None
    run.soft_cost.share.backward()
    # A higher offset is a lower level; no attention follows the last layer, so GABA is idle there.
    layers = 2 if name == "gaba" else 3
    assert (modulator.predictor.offset.grad[:layers] < 0).all()


def test_rest_can_be_trained_from(llama: Any, ids: Tensor):
    modulator = tiny_modulator(shape_of(llama))
    logits, run = soft(llama, modulator, ids, 0.0, budget=1.0)
    assert run.soft_cost is not None
    (logits.mean() + run.soft_cost.share).backward()
    for name, parameter in modulator.predictor.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_soft_leaves_nothing_behind(llama: Any, modulator: Modulator, ids: Tensor):
    own = llama(ids).logits
    soft(llama, modulator, ids, 0.2)
    assert torch.equal(llama(ids).logits, own)
    assert llama.config._attn_implementation == "sdpa"

"""KV heads that read unequally: both executors, the ledger, and what a query may not see."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import random_plan, random_spread, tiny_modulator, tokens
from vesicle.cost import price, price_tokens
from vesicle.engine import Engine, core
from vesicle.errors import VesicleError
from vesicle.modulator.author import ModulatorAuthor
from vesicle.modulator.method import ModulatorMethod
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import Dense, Method, Plan, Replay, StandIns
from vesicle.plan.spread import LEAST, UNIT, blocks_of_heads
from vesicle.reading import Reading, blocks_for
from vesicle.reference.attach import attach

LENGTH = 240
"""15 blocks, so that heads may read fewer than the least of all."""
FP64 = 5e-5
"""Attention over chosen blocks takes its softmax in fp32."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def method_for(engine: Engine, summary: str) -> Method:
    """A Plan that reads unequally in KV heads, and is at rest but for that."""
    rng = np.random.default_rng(5)
    plan = random_plan(engine.shape, LENGTH, rng)
    rest = Plan.rest(engine.shape, LENGTH).with_fields(kv_blocks=plan.kv_blocks)
    spread = random_spread(engine.shape, rng)
    return Replay(rest, StandIns(summary=summary, spread=spread, nearest=3))


def executed(engine: Engine, ids: Tensor, method: Method, cuts: tuple[int, ...] = ()) -> Any:
    sequence, row = engine.start(method), ids[0].tolist()
    pieces = [
        engine.forward([(sequence, row[start:stop])], logits="all")[0]
        for start, stop in zip((0, *cuts), (*cuts, len(row)), strict=True)
    ]
    return torch.cat(pieces), sequence


def test_engine_and_reference_agree(model: Any):
    agree(model, "mean")


def test_engine_and_reference_agree_by_bounds(llama: Any):
    agree(llama, "bounds")


def agree(model: Any, summary: str) -> None:
    engine, ids = Engine.from_model(model), tokens(LENGTH, seed=4)
    method = method_for(engine, summary)
    logits, sequence = executed(engine, ids, method, (130, 131, 200))
    with attach(model, method) as run:
        expected = model(ids).logits[0]
    assert (logits - expected).abs().max() < FP64
    assert run.plan.equals(sequence.plan)
    assert (expected - model(ids).logits[0]).abs().max() > 1e-3  # something was left out
    assert sequence.cost == price(sequence.plan, engine.shape, sequence.overhead)
    prices = price_tokens(sequence.plan, engine.shape, sequence.overhead)
    for name, values in prices.items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)


@pytest.mark.skipif(not core.available(), reason="there is no native core")
def test_the_core_does_as_pytorch(model: Any, monkeypatch: pytest.MonkeyPatch):
    engine, ids = Engine.from_model(model.float()), tokens(LENGTH, seed=4)
    method = method_for(engine, "mean")
    native, first = executed(engine, ids, method, (130, 131, 132, 200))
    monkeypatch.setattr(core, "available", lambda: False)
    other, second = executed(Engine.from_model(model), ids, method, (130, 131, 132, 200))
    assert (native - other).abs().max() < 2e-3
    assert first.plan.equals(second.plan)
    assert first.cost == second.cost


def test_later_tokens_change_nothing(llama: Any):
    engine, ids = Engine.from_model(llama), tokens(LENGTH, seed=4)
    other = ids.clone()
    other[:, 180:] = tokens(LENGTH - 180, seed=9)
    method = method_for(engine, "mean")
    (a, _), (b, _) = (executed(engine, x, method) for x in (ids, other))
    assert (a[:180] - b[:180]).abs().max() < FP64


def test_more_than_there_is_is_the_dense_model(model: Any):
    engine, ids = Engine.from_model(model), tokens(LENGTH, seed=4)
    profile = np.random.default_rng(0).normal(size=(engine.shape.n_layers, engine.shape.n_kv_heads))
    whole = executed(engine, ids, Reading(16 * LENGTH, engine.shape, profile=profile))
    dense = executed(engine, ids, Dense())
    assert torch.equal(whole[0], dense[0])
    assert whole[1].cost == dense[1].cost


def test_a_number_is_read_and_all_is_held(llama: Any):
    engine, ids = Engine.from_model(llama), tokens(512, seed=4)
    profile = np.random.default_rng(0).normal(size=(engine.shape.n_layers, engine.shape.n_kv_heads))
    _, sequence = executed(engine, ids, Reading(160, engine.shape, profile=profile))
    counted = [c["flops_attention"] for c in (sequence.token_costs, sequence.dense_token_costs)]
    assert counted[0][:128].tolist() == counted[1][:128].tolist()
    read = counted[0][-16:] / counted[1][-16:] * np.arange(497, 513)  # entries, on average
    assert (read > 130).all()
    assert (read <= 160).all()
    assert sequence.cost.kv_bytes_held == sequence.dense_cost.kv_bytes_held


@pytest.fixture(params=["alone", "generated", "all"])
def bounded(request: pytest.FixtureRequest, llama: Any) -> tuple[Engine, Method, Any]:
    """A modulator within a reading: at rest, on generated tokens, on all."""
    engine = Engine.from_model(llama)
    profile = np.random.default_rng(0).normal(size=(engine.shape.n_layers, engine.shape.n_kv_heads))
    reading = Reading(160, engine.shape, profile=profile)
    modulator = tiny_modulator(engine.shape, "linear")
    if request.param == "alone":
        return engine, ModulatorMethod(modulator, 1.0, None, reading), reading
    phases = EVERYWHERE if request.param == "all" else Phases()
    return engine, ModulatorMethod(modulator, 0.6, phases, reading), None


def generated(engine: Engine, ids: Tensor, method: Method) -> Any:
    """A prompt of 240 tokens, and the others one by one."""
    sequence, row = engine.start(method), ids[0].tolist()
    sequence.author.prompt(0, 240)
    pieces = [engine.forward([(sequence, row[:240])], logits="all")[0]]
    pieces += [engine.forward([(sequence, [i])], logits="all")[0] for i in row[240:]]
    return torch.cat(pieces), sequence


def test_a_modulator_within_a_reading(bounded: Any):
    engine, method, reading = bounded
    ids = tokens(250, seed=4)
    logits, sequence = generated(engine, ids, method)
    full = engine.shape.layer_windows == 0
    most = Reading(160, engine.shape).layer_blocks[full].max() * 3
    assert (sequence.plan.kv_blocks[:, full] <= most).all()
    assert (sequence.plan.kv_blocks <= method.reading.most).all()
    released = sequence.author.releases(np.arange(250))
    assert sequence.cost == price(sequence.plan, engine.shape, sequence.overhead, released=released)
    if reading is not None:
        alone, other = generated(engine, ids, reading)
        assert torch.equal(alone, logits)
        assert other.plan.equals(sequence.plan)
        assert other.cost == sequence.cost
        return
    free, unbound = generated(engine, ids, ModulatorMethod(method.modulator, 0.6, method.phases))
    assert (unbound.plan.kv_blocks > method.reading.most).any()
    assert (free - logits).abs().max() > 1e-3


def test_a_modulator_within_a_reading_in_the_reference(bounded: Any, llama: Any):
    engine, method, _ = bounded
    method = ModulatorMethod(method.modulator, method.dial, EVERYWHERE, method.reading)
    ids = tokens(LENGTH, seed=4)
    logits, sequence = executed(engine, ids, method, (130, 131, 200))
    with attach(llama, method) as run:
        expected = llama(ids).logits[0]
    assert (logits - expected).abs().max() < FP64
    assert run.plan.equals(sequence.plan)


@pytest.mark.skipif(not core.available(), reason="there is no native core")
def test_a_modulator_within_a_reading_in_the_core(
    bounded: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
):
    _, method, _ = bounded
    ids = tokens(250, seed=4)
    engine = Engine.from_model(llama.float())
    method.modulator.float()  # as saved ones are
    asked: list[int] = []
    ask = ModulatorAuthor.ffn
    monkeypatch.setattr(
        ModulatorAuthor, "ffn", lambda self, *a: (asked.append(0), ask(self, *a))[1]
    )
    native, first = generated(engine, ids, method)
    assert not asked, "the core decides by itself"
    monkeypatch.setattr(core, "available", lambda: False)
    other, second = generated(Engine.from_model(llama), ids, method)
    assert (native - other).abs().max() < 5e-3
    same = (first.plan.kv_blocks == second.plan.kv_blocks).mean()
    assert same > 0.999


def test_blocks_of_heads():
    spread = np.array([0, UNIT // 2, UNIT, 3 * UNIT])
    for wanted, visible in ((2, 40), (8, 40), (20, 40), (39, 40), (40, 40), (60, 40)):
        found = blocks_of_heads(np.array([wanted]), np.array([visible]), spread)
        if wanted >= visible:
            assert (found == visible).all()
            continue
        expected = [max(wanted * m // UNIT, min(wanted, LEAST)) for m in spread.tolist()]
        assert found.tolist() == [min(x, visible) for x in expected]


def test_blocks_for_heads():
    profile = np.log(np.array([[64.0, 1.0], [1.0, 1.0], [4.0, 16.0]]))
    sees_all = np.array([True, False, True])
    blocks = blocks_for(10, profile, sees_all)
    assert (blocks[1] == 0).all()  # a windowed layer reads all that it sees
    assert blocks[sees_all].mean() == pytest.approx(10)
    assert blocks[0, 1] == 5  # half of the mean at least
    assert blocks[2, 1] == pytest.approx(2 * blocks[2, 0])  # the root of their parts
    assert blocks[0, 0] == pytest.approx(2 * blocks[2, 1])


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        (((1, 2),), "1 layers and 2 KV heads; allowed"),
        (((-1, 5),) * 3, "has -1; allowed: whole numbers from 0"),
    ],
)
def test_a_spread_that_does_not_fit(llama: Any, spread: Any, message: str):
    engine = Engine.from_model(llama)
    if len(spread) == 3:
        spread = spread[: engine.shape.n_layers]
    plan = Plan.rest(engine.shape, 8)
    with pytest.raises(VesicleError, match=message):
        engine.start(Replay(plan, StandIns(spread=spread)))


def test_readings_that_are_none(llama: Any):
    shape = Engine.from_model(llama).shape
    with pytest.raises(VesicleError, match=r"entries is 127; allowed: 128 and above"):
        Reading(127, shape)
    with pytest.raises(VesicleError, match=r"profile of shape \(1, 1\)"):
        Reading(256, shape, profile=np.zeros((1, 1)))

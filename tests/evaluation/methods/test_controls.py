"""Controls: priced without running, equal cost, and what each keeps of the learnt levels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.evaluation.helpers import ledger_of, some_windows
from tests.tiny import SHAPE, shape_of, tiny_control, tiny_modulator
from vesicle.cost import price
from vesicle.errors import BudgetError
from vesicle.evaluation.execution.language_modelling import score
from vesicle.evaluation.methods import controls
from vesicle.evaluation.methods.controls import NAMES, Control
from vesicle.evaluation.methods.ledger import Ledger, released
from vesicle.evaluation.methods.matching import TOLERANCE, Matched, match
from vesicle.evaluation.methods.tuning import tune_dial
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import FloatArray, Method
from vesicle.predictors import CONTROLS
from vesicle.reference.attach import attach

T = 64
TARGETS = (0.95, 0.8, 0.6)


@pytest.fixture
def windows() -> Tensor:
    return some_windows(3, T)


@pytest.fixture
def ledger(llama: Any) -> Ledger:
    shape = shape_of(llama)
    return ledger_of(tiny_modulator(shape), shape, T, n=3)


@pytest.fixture
def learnt(llama: Any, ledger: Ledger, windows: Tensor) -> list[FloatArray]:
    return score(llama, windows, ledger.modulator.at(0.7), keep_levels=True).levels


def build(
    name: str, ledger: Ledger, target: float, learnt: list[FloatArray], model: Any, ids: Tensor
) -> Control:
    loss = loss_on(model, ids[:2, :40])
    seed = 4 if name == "random" else 0
    return controls.control(name, ledger, target, seed=seed, learnt=learnt, n=3, loss=loss)


def loss_on(model: Any, ids: Tensor) -> Callable[[Method], float]:
    """Windows in one pass, as `best-of-n` selects by them."""
    n, length = ids.shape
    return lambda method: float(score(model, ids, method, batch=n).nats.sum() / (n * (length - 1)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_equal_executed_cost(
    name: str,
    target: float,
    ledger: Ledger,
    learnt: list[FloatArray],
    llama: Any,
    windows: Tensor,
):
    built = build(name, ledger, target, learnt, llama, windows)
    executed = score(llama, windows, built.method, batch=2).cost_share
    assert built.name == name
    assert executed == pytest.approx(target, rel=TOLERANCE)
    # What was priced without running is what runs.
    assert executed == pytest.approx(built.cost_share, rel=1e-12)


@pytest.mark.parametrize("kind", list(CONTROLS))
@pytest.mark.parametrize("ladder", [False, True])
def test_plan_without_running_is_the_executed_plan(
    kind: str, ladder: bool, model: Any, windows: Tensor
):
    shape = shape_of(model)
    modulator = tiny_modulator(shape, ladder=ladder, bypass_below=0.3)
    levels = tiny_control(kind, modulator.predictor.config)
    control = modulator.with_levels(levels)
    with attach(model, control.at(1.0)) as run:
        model(input_ids=windows[:1])
    ledger, of_control = (ledger_of(m, shape, T) for m in (modulator, control))
    plan = of_control.plan(released(control, T))
    assert plan.equals(run.plan)
    overhead = control.at(1.0).overhead(shape)
    deficits = 1.0 - released(control, T)[..., ledger.columns]
    rest = np.zeros((shape.n_layers, 3))
    assert ledger.share(rest) == 1.0
    dense = price(ledger.plan(np.ones((T, shape.n_layers, 5))), shape).flops_total
    assert ledger.share(deficits) == price(run.plan, shape, overhead).flops_total / dense


def test_learnt_plan_follows_from_its_levels(llama: Any, windows: Tensor):
    shape = shape_of(llama)
    modulator = tiny_modulator(shape)
    with attach(llama, modulator.at(0.6)) as run:
        llama(input_ids=windows[:1])
    assert ledger_of(modulator, shape, T).plan(run.levels[0]).equals(run.plan)


def test_one_transmitter_alone(llama: Any):
    shape = shape_of(llama)
    ledger = ledger_of(tiny_modulator(shape, transmitters=("gaba",)), shape, T)
    assert controls.uniform(ledger, 0.99).cost_share == pytest.approx(0.99, rel=TOLERANCE)
    with pytest.raises(BudgetError, match="cannot be reached: these levels end at"):
        controls.uniform(ledger, 0.5)


def test_jumps_are_dithered():
    """All tokens pass serotonin's only step together; the cost between its sides needs both."""
    modulator = tiny_modulator(SHAPE, transmitters=("serotonin",))
    ledger = ledger_of(modulator, SHAPE, T)
    found = match(ledger, lambda x: np.full((3, 1), x), 0.8, high=1.0)
    assert found.dither is not None
    assert found.deficits.shape == (T, 3, 1)
    assert len(np.unique(found.deficits.round(6))) <= 2
    assert ledger.share(found.deficits) == found.cost_share == pytest.approx(0.8, rel=TOLERANCE)


def test_mixes_keep_what_they_should(ledger: Ledger, learnt: list[FloatArray]):
    deficits = 1 - np.stack(learnt)[..., ledger.columns]

    def directions(control: Control) -> FloatArray:
        assert not isinstance(control.deficits, list)
        return control.deficits / control.details["x"]

    mix = controls.uniform_mix(ledger, 0.9, learnt)
    layers = controls.per_layer(ledger, 0.9, learnt)
    if mix.details["dither"] is None:
        np.testing.assert_allclose(directions(mix), np.tile(deficits.mean((0, 1, 2)), (3, 1)))
    np.testing.assert_allclose(mix.details["mean_deficits"], deficits.mean((0, 1, 2)))
    np.testing.assert_allclose(layers.details["mean_deficits"], deficits.mean((0, 1)))


def test_shuffled_keeps_each_layers_levels(ledger: Ledger, learnt: list[FloatArray]):
    built = controls.shuffled(ledger, 0.8, learnt)
    x = built.details["x"]
    for window, levels in zip(built.deficits, learnt, strict=True):
        own = x * (1 - levels[..., ledger.columns])
        assert not np.allclose(window, own)
        np.testing.assert_allclose(np.sort(window, axis=0), np.sort(own, axis=0), atol=1e-12)
    assert not np.array_equal(
        np.argsort(built.deficits[0][:, 0, 0]), np.argsort(built.deficits[1][:, 0, 0])
    )


def test_random_is_reproducible(ledger: Ledger):
    a, b, c = (controls.random(ledger, 0.8, seed) for seed in (1, 1, 2))
    assert np.array_equal(a.deficits, b.deficits)
    assert not np.array_equal(a.deficits, c.deficits)


def test_best_of_n_takes_the_best(ledger: Ledger, llama: Any, windows: Tensor):
    selection = windows[:2, :40]
    on_selection = loss_on(llama, selection)
    found = controls.best_of_n(ledger, 0.8, on_selection, n=6)
    loss = score(llama, selection, found.method, batch=2).nats.sum() / (2 * 39)
    assert loss == pytest.approx(found.details["selection_loss_nats"], rel=1e-12)
    assert loss <= found.details["selection_quartiles_nats"][0]
    one = controls.best_of_n(ledger, 0.8, on_selection, n=1)
    assert found.details["selection_loss_nats"] <= one.details["selection_loss_nats"]


def share_on(model: Any, ids: Tensor) -> Callable[[ModulatorMethod], float]:
    return lambda method: score(model, ids, method, batch=len(ids)).cost_share


@pytest.mark.parametrize("preview", [2, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_learnt_is_tuned(target: float, preview: int, llama: Any, ledger: Ledger):
    ids = some_windows(6, T)
    stages = [share_on(llama, some) for some in (ids[:preview], ids)]
    dial = tune_dial(ledger.modulator, target, *stages, near=TOLERANCE)
    found = stages[-1](ModulatorMethod(ledger.modulator, dial))
    assert found == pytest.approx(target, rel=TOLERANCE)
    assert 0 < dial < 1


def test_tuning_to_rest(llama: Any, modulator: Modulator, windows: Tensor):
    dial = tune_dial(modulator, 1.0, share_on(llama, windows))
    assert dial == 1.0
    rest = score(llama, windows, ModulatorMethod(modulator, dial))
    assert np.array_equal(rest.nats, score(llama, windows).nats)


def test_cost_out_of_reach(llama: Any, windows: Tensor):
    modulator = tiny_modulator(shape_of(llama), transmitters=("gaba",))
    with pytest.raises(BudgetError, match=r"no dial of this modulator gives a cost of 0\.500"):
        tune_dial(modulator, 0.5, share_on(llama, windows))


def test_matched_is_plain_data():
    assert Matched(deficits=np.zeros((1, 1)), x=0.0, dither=None, cost_share=1.0).x == 0.0


def test_tables_of_no_two_seeds_coincide():
    """Also where a large seed spills into NumPy's next word; seed 0 draws as it did."""
    seeds = (0, 1, 5, 10007, 2**32, 2**32 + 5, 3 * 2**32 + 5)
    tables = {controls.random_table((3, 2), seed, i).tobytes() for seed in seeds for i in range(5)}
    assert len(tables) == 5 * len(seeds)
    plain = np.random.default_rng([0, 4]).random((3, 2))
    np.testing.assert_array_equal(controls.random_table((3, 2), 0, 4), plain)


def test_a_static_shape_is_one_table_and_better_than_random_ones(
    ledger: Ledger, llama: Any, windows: Tensor
):
    """On the text that it was found on, which favours it."""
    loss = loss_on(llama, windows)
    for target in (0.9, 0.7):
        shape = controls.static_shape(ledger, target, loss)
        table = np.asarray(shape.deficits)
        if table.ndim == 3:  # only to meet the cost do some tokens take the step before
            assert all(len(np.unique(table[:, n], axis=0)) <= 2 for n in range(table.shape[1]))
        tables = [controls.random_table(table.shape[-2:], 0, i) for i in range(4)]
        drawn = [match(ledger, lambda x, t=t: x * t, target) for t in tables]
        others = [controls.from_deficits("random", ledger, found) for found in drawn]
        assert loss(shape.of(0)) < np.mean([loss(other.of(0)) for other in others])
    with pytest.raises(BudgetError, match="cannot be reached by single steps"):
        controls.static_shape(ledger, 0.01, loss)

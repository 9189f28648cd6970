"""The greedy oracle: equal cost, no worse than what it is given, and a path of single steps."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.evaluation.helpers import ledger_of, some_windows
from tests.tiny import shape_of, tiny_modulator
from vesicle.errors import BudgetError
from vesicle.evaluation.execution.language_modelling import score
from vesicle.evaluation.methods import controls
from vesicle.evaluation.methods.descent import Descent, Losses, OracleConfig
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.methods.oracle import oracle

T = 48


@pytest.fixture
def windows() -> Tensor:
    return some_windows(2, T)


@pytest.fixture
def ledger(llama: Any) -> Ledger:
    shape = shape_of(llama)
    return ledger_of(tiny_modulator(shape), shape, T, n=2)


def losses_on(model: Any, window: Tensor) -> Losses:
    return lambda methods: [
        float(score(model, window[None], method).nats[0]) / (len(window) - 1) for method in methods
    ]


@pytest.fixture
def descents(llama: Any, ledger: Ledger, windows: Tensor) -> list[Descent]:
    return [Descent(losses_on(llama, w), ledger, OracleConfig()) for w in windows]


def test_equal_cost_and_no_worse_than_uniform(
    llama: Any, ledger: Ledger, windows: Tensor, descents: list[Descent]
):
    greedy = 0
    for target in (0.9, 0.75, 0.6):
        uniform = controls.uniform(ledger, target)
        found = oracle(descents, ledger, target, [uniform])
        best = score(llama, windows, found.method, batch=2)
        assert best.cost_share == pytest.approx(target, rel=TOLERANCE)
        assert best.cost_share == pytest.approx(found.cost_share, rel=1e-12)
        assert (best.nats <= score(llama, windows, uniform.method, batch=2).nats + 1e-9).all()
        greedy += found.details["taken"].count("greedy")
    assert greedy > 0


def test_path_falls_one_cell_at_a_time(descents: list[Descent]):
    descent = descents[0]
    assert descent.at(0.7) is not None
    shares = [share for share, _ in descent._path]
    assert shares[0] == 1.0
    assert all(a > b for a, b in pairwise(shares))
    for (_, before), (_, after) in pairwise(descent._path):
        assert (before != after).sum() == 1


def test_path_does_not_depend_on_the_costs_asked_for(llama: Any, ledger: Ledger, windows: Tensor):
    once, often = (Descent(losses_on(llama, windows[0]), ledger, OracleConfig()) for _ in range(2))
    for target in (0.95, 0.9, 0.8):
        often.at(target)
    a, b = once.at(0.7), often.at(0.7)
    assert a is not None
    assert b is not None
    assert np.array_equal(np.asarray(a.deficits), np.asarray(b.deficits))


def test_first_step_is_the_cheapest(llama: Any, ledger: Ledger, windows: Tensor):
    """Against every single step, scored by hand."""
    descent = Descent(losses_on(llama, windows[0]), ledger, OracleConfig(step=0.25, batch=1))
    descent._round()
    rest, first = descent._path[0][1], descent._path[1][1]

    def ratio(table: np.ndarray) -> float:
        method = ledger.method(ledger.table(table))
        nats = score(llama, windows[:1], method).nats - score(llama, windows[:1]).nats
        return float(nats[0]) / (1 - ledger.share(table))

    tables = []
    for cell in np.ndindex(*rest.shape):
        for deficit in (0.25, 0.5, 0.75, 1.0):
            table = rest.copy()
            table[cell] = deficit
            if ledger.share(table) < 1:
                tables.append(table)
                break
    assert ratio(first) == pytest.approx(min(map(ratio, tables)), rel=1e-6)


def test_cost_out_of_reach(llama: Any, windows: Tensor):
    shape = shape_of(llama)
    ledger = ledger_of(tiny_modulator(shape, transmitters=("gaba",)), shape, T)
    descent = Descent(losses_on(llama, windows[0]), ledger, OracleConfig())
    assert descent.at(0.5) is None
    with pytest.raises(BudgetError, match="the oracle cannot reach"):
        oracle([descent], ledger, 0.5)


@pytest.mark.parametrize(
    ("setting", "value"), [("step", 0.0), ("stride", 1.5), ("again", 0.0), ("batch", 0)]
)
def test_config_checks_itself(setting: str, value: float):
    with pytest.raises(ValueError, match=f"{setting} is {value}; allowed"):
        OracleConfig(**{setting: value})

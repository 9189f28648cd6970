"""Methods by name: who decides on the items of a task, at equal executed cost.

`dense` is the model itself and `learnt` the modulator. Controls keep the modulator's effectors and
stand-ins and set their levels by a rule (`controls`); each is scaled so that it executes the share
of the dense FLOPs that the learnt modulator executed on these very items, or the budget where
`learnt` is not run. A press of kvpress is given as `kvpress:NAME`; its budget is the share of
cached entries that it keeps.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation import controls
from vesicle.evaluation.controls import TOLERANCE, dial_at, random_table, solve
from vesicle.evaluation.item_ledger import ItemLedger
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import Phases
from vesicle.plan import FloatArray, Method
from vesicle.predictors import ConstantLevels, ReplayLevels, ShuffledLevels, spread_seed

PRESS = "kvpress:"
CONTROLS = ("uniform", "uniform-mix", "per-layer", "random", "shuffled", "best-of-n")
NAMES = ("dense", "learnt", *CONTROLS)
FROM_LEARNT = ("uniform-mix", "per-layer", "shuffled")
"""Controls that are made from the levels of the learnt run."""

NEAR = 0.02
"""How far from a budget a dial may stay, as a part of it, where the share jumps there.

Controls are scaled to the share that was executed, so that costs are equal all the same.
"""

MethodOf = Callable[[int], Method | None]
"""From an item's place in the task to the method that decides on it."""


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods in the order in which they are run, without repetitions.

    Raises:
        VesicleError: A name is unknown; near ones are named.
    """
    for name in names:
        if name in NAMES:
            continue
        if name.startswith(PRESS):
            from vesicle.presses import check_press

            check_press(name.removeprefix(PRESS))
            continue
        near = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise VesicleError(
            f"unknown method {name!r}{hint}; known: {', '.join(NAMES)}, and {PRESS}NAME for a "
            "press of kvpress"
        )
    ours = [name for name in NAMES if name in names]
    return (*ours, *dict.fromkeys(name for name in names if name not in NAMES))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A method that is ready to run.

    Attributes:
        of: The method for each item.
        details: What it was set to, as JSON can hold it.
    """

    of: MethodOf
    details: dict[str, Any] = field(default_factory=dict)


def tune_dial(
    modulator: Modulator,
    target: float,
    share: Callable[[ModulatorMethod], float],
    phases: Phases | None = None,
) -> float:
    """The dial at which `share` of a modulator's method is the target.

    Raises:
        BudgetError: If no dial gives it.
    """
    start = min(max(modulator.dial(target, phases), 1e-5), 1 - 1e-5)
    x = math.log((1 - start) / start)

    tried: list[tuple[float, float]] = []

    def measure(x: float) -> float:
        value = share(ModulatorMethod(modulator, dial_at(x), phases))
        tried.append((abs(value / target - 1), x))
        return value

    try:
        x, _ = solve(measure, target, x, -0.2, TOLERANCE)
    except BudgetError:
        # An answer that changes with the dial makes the share of its few tokens jump.
        off, x = min(tried, default=(math.inf, x))
        if off > NEAR:
            raise
    return dial_at(x)


def control(
    name: str,
    ledger: ItemLedger,
    target: float,
    *,
    seed: int,
    learnt: Sequence[FloatArray] = (),
    best_of: int = 0,
    score: Callable[[Method], float] | None = None,
) -> Chosen:
    """A control at an executed share of the dense FLOPs.

    Args:
        name: One of `CONTROLS`.
        ledger: Prices levels on the task's items.
        target: The share.
        seed: Of whatever is random.
        learnt: Levels (T, L, 5) that the learnt run released on each item, for `FROM_LEARNT`.
        best_of: Random tables that `best-of-n` tries.
        score: The loss by which it selects, in nats.

    Raises:
        BudgetError: If the share cannot be reached.
    """
    if name == "shuffled":
        return _shuffled(ledger, target, learnt, seed)
    if name == "best-of-n":
        assert score is not None
        return _best_of_n(ledger, target, best_of, score, seed)
    match name:
        case "uniform":
            found = controls.uniform(ledger, target, seed)
        case "random":
            found = controls.random(ledger, target, seed)
        case "uniform-mix":
            found = controls.uniform_mix(ledger, target, learnt, seed)
        case "per-layer":
            found = controls.per_layer(ledger, target, learnt, seed)
        case _:
            raise ValueError(f"{name!r} is no control; known: {', '.join(CONTROLS)}")
    method = found.method
    assert isinstance(method, Method)
    return Chosen(of=lambda i: method, details={"priced": found.cost_share, **found.details})


def _shuffled(ledger: ItemLedger, target: float, learnt: Sequence[FloatArray], seed: int) -> Chosen:
    """Each item's learnt levels, permuted in time within each layer.

    Cost depends on where few blocks are read, and answers may differ in length, so that deficits
    are scaled where a permutation changed the cost.
    """
    mixed = [
        1.0
        - ShuffledLevels(
            ledger.config, levels[..., ledger.columns], spread_seed(seed, i)
        ).levels.numpy()
        for i, levels in enumerate(learnt)
    ]

    def share(x: float) -> float:
        return ledger.each([x * d for d in mixed])

    x, found = 1.0, share(1.0)
    low, high = 0.0, 1.0
    while found > target * (1 + TOLERANCE) and high < 64:
        low, high = high, high * 2
        x, found = high, share(high)
    if abs(found / target - 1) > TOLERANCE:
        for _ in range(30):
            x = (low + high) / 2
            found = share(x)
            if abs(found / target - 1) <= TOLERANCE:
                break
            low, high = (x, high) if found > target else (low, x)
        else:
            raise BudgetError(
                f"a cost of {target:.3f} of dense cannot be matched by shuffled levels; "
                f"the nearest is {found:.4f}"
            )
    tables = [np.clip(x * d, 0.0, 1.0) for d in mixed]

    def of(i: int) -> Method:
        return ledger.method(ReplayLevels(ledger.config, 1.0 - tables[i]))

    return Chosen(of=of, details={"priced": found, "x": x})


def _best_of_n(
    ledger: ItemLedger, target: float, n: int, score: Callable[[Method], float], seed: int
) -> Chosen:
    shape = (ledger.config.n_layers, len(ledger.config.transmitters))
    best: tuple[float, int, ModulatorMethod, float] | None = None
    losses = []
    for i in range(n):
        table = random_table(shape, seed, i)
        found = controls.match(
            ledger,
            lambda x, table=table: x * table,  # type: ignore[misc]  # mypy cannot type a default in a lambda
            target,
            seed=spread_seed(seed, i),
        )
        deficits = found.deficits
        kind = ReplayLevels if deficits.ndim == 3 else ConstantLevels
        method = ledger.method(kind(ledger.config, 1.0 - np.clip(deficits, 0.0, 1.0)))
        losses.append(score(method))
        if best is None or losses[-1] < best[0]:
            best = (losses[-1], i, method, found.cost_share)
    assert best is not None
    loss, index, method, priced = best
    return Chosen(
        of=lambda i: method,
        details={
            "priced": priced,
            "n": n,
            "index": index,
            "selection_nats": loss,
            "selection_quartiles_nats": [float(q) for q in np.quantile(losses, (0.25, 0.5, 0.75))],
        },
    )

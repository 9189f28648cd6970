"""Levels that no one learnt, at equal executed cost: what a learnt modulator must beat.

Each control keeps the modulator's effectors and stand-ins, and sets their levels by a rule with one
free number x. The executed cost falls as x rises, so x is found by bisection for any asked cost. No
control reads hidden states: its Plan, and so its exact cost, follow from the levels alone, and
nothing is run to find x.

=============  ============================================================================
control        deficits 1 - level of token t, layer l, transmitter a
=============  ============================================================================
`uniform`      x, the same everywhere
`uniform-mix`  x m_a, m_a the learnt run's mean: its mix, but nothing of layers and tokens
`per-layer`    x m_la, the learnt run's mean of each layer: nothing of tokens. An ablation
               of the modulator, as it takes over what that learnt about layers
`random`       x u_tla, u drawn from U(0, 2)
`shuffled`     x times the window's learnt deficits, permuted in time within each layer
`best-of-n`    x r_la, the best of N random tables: half of them r ~ U(0, 1), half with each
               transmitter's column multiplied by one more draw. Duo-LLM found that routers
               often do no better than the best of 100 such plans
=============  ============================================================================

Deficits end at 1. `uniform-mix` and `per-layer` use means over the very windows that are evaluated,
and `best-of-n` selects on (the beginnings of) windows that are evaluated: both favour the controls.

Effects with steps, such as serotonin's ladder, make cost jump where many tokens pass a step
together. If the asked cost falls inside a jump, tokens and layers are divided at random between the
two sides of it, in the proportion that the cost asks for (`dither` in the details).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.cost import price, price_dense
from vesicle.errors import BudgetError
from vesicle.evaluation.language_modelling import Scores, executed_share, score
from vesicle.modulator import DECIMALS, Modulator, ModulatorMethod, plan_rows
from vesicle.phases import Phases
from vesicle.plan import FloatArray, Method, Plan
from vesicle.predictors import (
    ConstantLevels,
    Levels,
    PredictorConfig,
    RandomLevels,
    ReplayLevels,
    ShuffledLevels,
    spread_seed,
)
from vesicle.shapes import ModelShape
from vesicle.transmitters import NAMES, index

TOLERANCE = 2e-3
"""Equal cost: executed and asked share differ by at most this part of the asked share."""

_FINE = 2e-4
_LARGEST_SCALE = 2.0**20
_PRESSURE = 14.0


def plan_from_levels(modulator: Modulator, shape: ModelShape, levels: FloatArray) -> Plan:
    """The Plan that an executor would fill for levels (T, L, 5) of a sequence from position 0.

    The whole LM head runs, as where all logits are needed.
    """
    positions = np.arange(len(levels), dtype=np.int32)
    rows = plan_rows(modulator, shape, levels.round(DECIMALS), positions)
    rows["head"] = 0
    return Plan(rows=rows)


def released(modulator: Modulator, n_tokens: int) -> FloatArray:
    """Levels (T, L, 5) of a modulator whose predictor does not read hidden states (a control)."""
    positions = torch.arange(n_tokens, dtype=torch.int32)[None]
    nothing, dial = torch.zeros(1, n_tokens, 0), torch.ones(1)
    rows = [
        modulator.release(layer, nothing, positions, dial, {})[0].double().numpy()
        for layer in range(modulator.predictor.config.n_layers)
    ]
    return np.stack(rows, axis=1)


class Ledger:
    """Prices levels on sequences of one length without running the model."""

    def __init__(
        self,
        modulator: Modulator,
        shape: ModelShape,
        n_tokens: int,
        phases: Phases | None = None,
    ) -> None:
        """For sequences of `n_tokens` under the effectors and stand-ins of `modulator`.

        All of their tokens are scored; `phases` are those that methods of controls have.
        """
        self.modulator, self.shape, self.n_tokens = modulator, shape, n_tokens
        self.phases = phases or Phases()
        self.config: PredictorConfig = modulator.predictor.config
        self.columns = [index(name) for name in self.config.transmitters]
        self._overhead = self.method(ConstantLevels(self.config, 1.0)).overhead(shape)
        self._dense = price_dense(shape, n_tokens).flops_total

    def method(self, levels: Levels) -> ModulatorMethod:
        """The Method of a control."""
        return self.modulator.with_levels(levels).at(1.0, self.phases)

    def table(self, deficits: FloatArray) -> Levels:
        """Deficits (L, A) or (T, L, A) as a control."""
        levels = 1.0 - np.clip(deficits, 0.0, 1.0)
        kind = ReplayLevels if levels.ndim == 3 else ConstantLevels
        return kind(self.config, levels)

    def control_share(self, levels: Levels) -> float:
        """Executed FLOPs under a control as a share of the dense model's."""
        return (
            self._executed(released(self.modulator.with_levels(levels), self.n_tokens))
            / self._dense
        )

    def share(self, deficits: FloatArray) -> float:
        """The same for deficits (L, A), (T, L, A) or, on average, (N, T, L, A)."""
        if deficits.ndim == 4:
            return float(np.mean([self.share(d) for d in deficits]))
        levels = np.ones((self.n_tokens, self.config.n_layers, len(NAMES)))
        levels[..., self.columns] = 1.0 - np.clip(deficits, 0.0, 1.0)
        return self._executed(levels) / self._dense

    def _executed(self, levels: FloatArray) -> int:
        """FLOPs of levels (T, L, 5)."""
        plan = plan_from_levels(self.modulator, self.shape, levels)
        return price(plan, self.shape, self._overhead).flops_total


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A member of a family of deficits that has the asked cost.

    Attributes:
        deficits: (L, A), (T, L, A) or (N, T, L, A).
        x: The free number.
        dither: Share of tokens and layers on the costlier... cheaper side of a jump; None without
        one.
        cost_share: Priced.
    """

    deficits: FloatArray
    x: float
    dither: float | None
    cost_share: float


def match(
    ledger: Ledger,
    family: Callable[[float], FloatArray],
    target: float,
    *,
    high: float | None = None,
    seed: int | Sequence[int] = 0,
) -> Matched:
    """Find the member of a family that executes `target`, by bisection.

    Args:
        ledger: Prices deficits.
        family: x to deficits; cost falls as x rises from 0.
        target: Executed share of the dense FLOPs.
        high: Largest x; by default 1 is doubled until it is large enough.
        seed: Of the random division of tokens and layers inside a jump of the cost.

    Raises:
        BudgetError: If the family cannot go as low, or not as close.
    """
    low, top = 0.0, 1.0 if high is None else high
    least = ledger.share(family(top))
    while high is None and least > target and top < _LARGEST_SCALE:
        top *= 2
        least = ledger.share(family(top))
    if least > target * (1 + _FINE):
        raise BudgetError(
            f"a cost of {target:.3f} of dense cannot be reached: these levels end at {least:.3f}"
        )
    x, start = top, top
    for _ in range(40):
        x = (low + top) / 2
        value = ledger.share(family(x))
        if abs(value / target - 1) <= _FINE:
            return Matched(deficits=family(x), x=x, dither=None, cost_share=value)
        low, top = (x, top) if value > target else (low, x)
        if top - low < 1e-8 * start:
            break
    above, below = family(low), family(top)
    uniform = np.random.default_rng(seed).random((ledger.n_tokens, ledger.config.n_layers, 1))
    best = Matched(deficits=below, x=top, dither=None, cost_share=ledger.share(below))
    some, most = 0.0, 1.0
    for _ in range(30):
        if abs(best.cost_share / target - 1) <= _FINE:
            break
        q = (some + most) / 2
        mixed = np.where(uniform < q, below, above)
        value = ledger.share(mixed)
        some, most = (q, most) if value > target else (some, q)
        if abs(value - target) < abs(best.cost_share - target):
            best = Matched(deficits=mixed, x=top, dither=q, cost_share=value)
    if abs(best.cost_share / target - 1) > TOLERANCE:
        raise BudgetError(
            f"a cost of {target:.3f} of dense cannot be matched within {TOLERANCE:.1%}; "
            f"the nearest is {best.cost_share:.4f}"
        )
    return best


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control at a cost.

    Attributes:
        name: As in the module's table.
        method: For all windows, or one for each.
        cost_share: Priced, over windows of the ledger's length.
        deficits: As matched: (L, A), (T, L, A) or (N, T, L, A).
        details: The free number and what else it was set to.
    """

    name: str
    method: Method | list[Method]
    cost_share: float
    deficits: FloatArray
    details: dict[str, Any]


def control(name: str, ledger: Ledger, matched: Matched, **details: Any) -> Control:
    """A control from matched deficits."""
    d = matched.deficits
    method: Method | list[Method] = (
        [ledger.method(ledger.table(part)) for part in d]
        if d.ndim == 4
        else ledger.method(ledger.table(d))
    )
    return Control(
        name=name,
        method=method,
        cost_share=matched.cost_share,
        deficits=d,
        details={"x": matched.x, "dither": matched.dither, **details},
    )


def uniform(ledger: Ledger, target: float, seed: int = 0) -> Control:
    """One level for all tokens, layers and transmitters."""
    shape = (ledger.config.n_layers, len(ledger.config.transmitters))
    found = match(ledger, lambda x: np.full(shape, x), target, high=1.0, seed=seed)
    return control("uniform", ledger, found)


def uniform_mix(
    ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0
) -> Control:
    """The learnt mean deficit per transmitter, for all tokens and layers.

    Args:
        ledger: Prices deficits.
        target: Executed share.
        learnt: Released levels, one (T, L, 5) a window.
        seed: Of a dither.
    """
    mean = _rows(ledger, learnt).mean((0, 1))
    n_layers = ledger.config.n_layers
    found = match(ledger, lambda x: np.tile(x * mean, (n_layers, 1)), target, seed=seed)
    return control("uniform-mix", ledger, found, mean_deficits=mean.tolist())


def per_layer(
    ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0
) -> Control:
    """The learnt mean deficit per layer and transmitter; arguments as `uniform_mix`."""
    mean = _rows(ledger, learnt).mean(0)
    found = match(ledger, lambda x: x * mean, target, seed=seed)
    return control("per-layer", ledger, found, mean_deficits=mean.tolist())


def random(ledger: Ledger, target: float, seed: int = 0) -> Control:
    """Deficits drawn for each token, layer and transmitter; the same in every window."""

    def drawn(x: float) -> RandomLevels:
        return RandomLevels(ledger.config, 1.0 - x, seed)

    def family(x: float) -> FloatArray:
        levels = released(ledger.modulator.with_levels(drawn(x)), ledger.n_tokens)
        return 1.0 - levels[..., ledger.columns]

    found = match(ledger, family, target, high=1.0, seed=seed)
    result = control("random", ledger, found, seed=seed)
    if found.dither is not None:
        return result
    return Control(
        name="random",
        method=ledger.method(drawn(found.x)),
        cost_share=found.cost_share,
        deficits=found.deficits,
        details=result.details,
    )


def shuffled(ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0) -> Control:
    """Each window's learnt levels, permuted in time within each layer; arguments as `uniform_mix`.

    The window's number, and `seed`, make the permutation. Cost depends on *where* few blocks are
    read, so a permutation may change it; deficits are scaled only if it did by more than
    `TOLERANCE`.
    """
    windows = [
        ShuffledLevels(ledger.config, levels[..., ledger.columns], spread_seed(seed, i))
        for i, levels in enumerate(learnt)
    ]
    deficits = np.stack([1.0 - w.levels.numpy() for w in windows])
    share = ledger.share(deficits)
    if abs(share / target - 1) <= TOLERANCE:
        return Control(
            name="shuffled",
            method=[ledger.method(w) for w in windows],
            cost_share=share,
            deficits=deficits,
            details={"x": 1.0, "dither": None},
        )
    found = match(ledger, lambda x: x * deficits, target, seed=seed)
    return control("shuffled", ledger, found)


def random_table(shape: tuple[int, int], seed: int, i: int) -> FloatArray:
    """Deficits (L, A) of the i-th of N random tables, before they are scaled to a cost."""
    # Below 2**32 the last word is 0, which NumPy ignores; above, a large seed stays apart from i.
    rng = np.random.default_rng([seed % 2**32, i, seed >> 32])
    table = rng.random(shape)
    return table * rng.random(shape[1]) if i % 2 else table


def best_of_n(
    ledger: Ledger,
    target: float,
    model: nn.Module,
    selection: Tensor,
    *,
    n: int = 100,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> Control:
    """The best of N random tables of levels per layer and transmitter, each at the asked cost.

    Args:
        ledger: Prices deficits, at the length of the windows that the cost is asked for.
        target: Executed share.
        model: A causal LM.
        selection: (M, S) token ids on which the best is chosen, in one batch.
        n: N.
        seed: Of the tables.
        on_tokens: Told after each pass how many tokens it had.
    """
    shape = (ledger.config.n_layers, len(ledger.config.transmitters))
    found: list[Matched] = []
    losses: list[float] = []
    for i in range(n):
        table = random_table(shape, seed, i)
        found.append(
            match(ledger, lambda x, table=table: x * table, target, seed=spread_seed(seed, i))  # type: ignore[misc]  # mypy cannot type a default in a lambda
        )
        method = ledger.method(ledger.table(found[-1].deficits))
        scores = score(model, selection, method, batch=len(selection), on_tokens=on_tokens)
        losses.append(float(scores.nats.sum() / (len(selection) * (selection.shape[1] - 1))))
    best = int(np.argmin(losses))
    return control(
        "best-of-n",
        ledger,
        found[best],
        n=n,
        index=best,
        selection_windows=len(selection),
        selection_length=int(selection.shape[1]),
        selection_loss_nats=losses[best],
        selection_quartiles_nats=[float(q) for q in np.quantile(losses, (0.25, 0.5, 0.75))],
    )


def _rows(ledger: Ledger, learnt: Sequence[FloatArray]) -> FloatArray:
    """Deficits (tokens, L, A) of all windows together, which may differ in length."""
    return 1.0 - np.concatenate([levels[..., ledger.columns] for levels in learnt])


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A learnt modulator at a cost: its dial and its scores, levels included."""

    dial: float
    scores: Scores


def tune_learnt(
    model: nn.Module,
    modulator: Modulator,
    ids: Tensor,
    target: float,
    *,
    batch: int = 1,
    preview: int = 4,
    on_tokens: Callable[[int], None] | None = None,
) -> Tuned:
    """Turn the dial until the executed cost on these windows is the asked one, within `TOLERANCE`.

    The share falls smoothly with log((1 - dial) / dial): a safeguarded secant finds it on a few
    windows first, without the LM head, and is corrected on all of them, which are scored at the
    same time.

    Args:
        model: A causal LM.
        modulator: With a trained predictor.
        ids: (N, T) token ids.
        target: Executed share; 1 is rest.
        batch: Windows in a forward pass.
        preview: Windows of the first stage, spread evenly.
        on_tokens: Told after each pass how many tokens it had.

    Raises:
        BudgetError: If no dial gives that cost.
    """
    if target == 1:
        scores = score(
            model, ids, modulator.at(1.0), batch=batch, keep_levels=True, on_tokens=on_tokens
        )
        return Tuned(dial=1.0, scores=scores)
    start = min(max(modulator.dial(target), 1e-5), 1 - 1e-5)
    x, slope = math.log((1 - start) / start), -0.2
    if len(ids) > preview:
        few = ids[torch.arange(preview) * len(ids) // preview]

        def share(x: float) -> float:
            return executed_share(
                model, few, ModulatorMethod(modulator, dial_at(x)), batch=batch, on_tokens=on_tokens
            )

        x, slope = solve(share, target, x, slope, TOLERANCE / 4)
    done: list[Tuned] = []

    def scored(x: float) -> float:
        scores = score(
            model,
            ids,
            ModulatorMethod(modulator, dial_at(x)),
            batch=batch,
            keep_levels=True,
            on_tokens=on_tokens,
        )
        done[:] = [Tuned(dial=dial_at(x), scores=scores)]
        return scores.cost_share

    solve(scored, target, x, slope, TOLERANCE)
    return done[0]


def dial_at(x: float) -> float:
    """The dial whose log-odds of being off rest, log((1 - dial) / dial), are x."""
    return 1.0 / (1.0 + math.exp(x))


def solve(
    measure: Callable[[float], float], target: float, x: float, slope: float, tolerance: float
) -> tuple[float, float]:
    """The x at which a falling function is `target`, and the slope there."""
    above: tuple[float, float] | None = None  # the last point that costs too much
    below: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    value = math.nan
    for step in range(16):
        value = measure(x)
        if last is not None and abs(x - last[0]) > 1e-6:
            measured = (value - last[1]) / (x - last[0])
            slope = measured if -2 < measured < -1e-3 else slope
        if abs(value / target - 1) <= tolerance:
            return x, slope
        last = (x, value)
        above, below = (last, below) if value > target else (above, last)
        guess = x + (target - value) / slope
        if above and below:
            if step > 8 or not above[0] < guess < below[0]:
                guess = (above[0] + below[0]) / 2
        else:
            guess = min(max(guess, x - 3), x + 3)
        if abs(x) >= _PRESSURE and abs(guess) >= _PRESSURE:
            break
        x = min(max(guess, -_PRESSURE), _PRESSURE)
    raise BudgetError(
        f"no dial of this modulator gives a cost of {target:.3f} of dense; "
        f"the last that was tried gives {value:.4f}"
    )

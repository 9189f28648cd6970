"""Turning a modulator's dial until what it executes is the asked share of the dense FLOPs.

The share falls smoothly with log((1 - dial) / dial), so that a safeguarded secant finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vesicle.errors import BudgetError
from vesicle.evaluation.language_modelling import Scores, evenly, executed_share, score
from vesicle.evaluation.matching import TOLERANCE
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import Phases

NEAR = 0.02
"""How far from a budget a dial may stay, as a part of it, where the share jumps there.

Controls are scaled to the share that was executed, so that costs are equal all the same.
"""

_PRESSURE = 14.0
_SLOPE = -0.2
"""Of the share over the log-odds, as a first guess."""


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
    tried: list[tuple[float, float]] = []

    def measure(x: float) -> float:
        value = share(ModulatorMethod(modulator, dial_at(x), phases))
        tried.append((abs(value / target - 1), x))
        return value

    try:
        x, _ = solve(measure, target, _start(modulator, target, phases), _SLOPE, TOLERANCE)
    except BudgetError:
        # An answer that changes with the dial makes the share of its few tokens jump.
        off, x = min(tried, default=(math.inf, 0.0))
        if off > NEAR:
            raise
    return dial_at(x)


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

    It is found on a few windows first, without the LM head, and is corrected on all of them, which
    are scored at the same time.

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
    x, slope = _start(modulator, target), _SLOPE
    if len(ids) > preview:
        few = ids[evenly(len(ids), preview)]

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


def _start(modulator: Modulator, target: float, phases: Phases | None = None) -> float:
    """The log-odds of the calibrated dial, as far as they are finite."""
    dial = min(max(modulator.dial(target, phases), 1e-5), 1 - 1e-5)
    return math.log((1 - dial) / dial)

"""Turning a modulator's dial until what it executes is the asked share of the dense FLOPs.

The share falls smoothly with log((1 - dial) / dial), so that a safeguarded secant finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vesicle.errors import BudgetError
from vesicle.evaluation.methods.matching import TOLERANCE
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
    *stages: Callable[[ModulatorMethod], float],
    phases: Phases | None = None,
    near: float = NEAR,
) -> float:
    """The dial at which the share of a modulator's method is the target.

    Args:
        modulator: Whose dial is turned.
        target: Executed share; 1 is rest.
        stages: Measure a method's share, each more dearly than the one before, from whose dial it
            goes on; the last one counts.
        phases: On which tokens transmitters act.
        near: How far from the target the share may stay, as a part of it, where it jumps there.

    Raises:
        BudgetError: If no dial gives it.
    """
    if target == 1:
        return 1.0
    x, slope = _start(modulator, target, phases), _SLOPE
    for number, share in enumerate(stages, 1):
        tried: list[tuple[float, float]] = []

        def measure(
            x: float,
            share: Callable[[ModulatorMethod], float] = share,
            tried: list[tuple[float, float]] = tried,
        ) -> float:
            value = share(ModulatorMethod(modulator, dial_at(x), phases))
            tried.append((abs(value / target - 1), x))
            return value

        last = number == len(stages)
        try:
            x, slope = solve(measure, target, x, slope, TOLERANCE if last else TOLERANCE / 4)
        except BudgetError:
            # An answer that changes with the dial makes the share of its few tokens jump.
            off, x = min(tried, default=(math.inf, x))
            if last and off > near:
                raise
    return dial_at(x)


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

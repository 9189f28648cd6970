"""Finding the member of a family of levels that executes an asked share of the dense FLOPs.

The executed cost falls as the family's one number x rises, so x is found by bisection. Effects with
steps, such as serotonin's ladder, make cost jump where many tokens pass a step together. If the
asked cost falls inside a jump, tokens and layers are divided at random between the two sides of it,
in the proportion that the cost asks for (`dither`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import BudgetError
from vesicle.evaluation.methods.ledger import Deficits, Ledger

TOLERANCE = 2e-3
"""Equal cost: executed and asked share differ by at most this part of the asked share."""

_FINE = 2e-4
_LARGEST_SCALE = 2.0**20


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A member of a family of deficits that has the asked cost.

    Attributes:
        deficits: (L, A), (T, L, A), or (T, L, A) for each sequence.
        x: The free number.
        dither: Share of tokens and layers on the cheaper side of a jump; None without one.
        cost_share: Priced.
    """

    deficits: Deficits
    x: float
    dither: float | None
    cost_share: float


def match(
    ledger: Ledger,
    family: Callable[[float], Deficits],
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
        mixed = _mixed(above, below, uniform < q)
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


def _mixed(above: Deficits, below: Deficits, goes_below: NDArray[np.bool_]) -> Deficits:
    """Where (T, L, 1) says so the lower of two deficits, elsewhere the upper."""
    if isinstance(above, list) and isinstance(below, list):
        return [
            np.where(goes_below[np.arange(len(a)) % len(goes_below)], b, a)
            for a, b in zip(above, below, strict=True)
        ]
    return np.where(goes_below, below, above)

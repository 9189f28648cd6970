"""Rules: how levels become decisions, as data.

Every decision is either a share of a width or a step of a ladder. An effector gives its rules;
`decide` evaluates them here, in NumPy fp64 for both executors, and `engine/core/rules.h` evaluates
the same table in native passes. At level 1 a rule gives what rests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FloatArray, IntArray, Rows, visible_blocks
from vesicle.plan.rows import BY_NAME
from vesicle.transmitters import index

VISIBLE = 0
"""Width of a rule whose share is of the blocks that are visible to the token."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of one number of a row.

    Attributes:
        field: Of the row.
        column: Which of its numbers.
        transmitter: Whose level decides it.
        next_layer: Whether levels that one layer released decide it in the layer after, since it is
            due before that layer has released its own.
    """

    field: str
    column: int = 0
    transmitter: str
    next_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class Share(Rule):
    """Part of a width: ceil(w s), s = 1 - rate (1 - level) from `floor` to 1, at least `least`.

    Attributes:
        rate: Part of the width lost from level 1 to level 0.
        floor: Least part kept.
        width: The whole; `VISIBLE` for the visible blocks.
        least: Least number kept, where there are as many.
    """

    rate: float
    floor: float = 0.0
    width: int
    least: int = 0

    def values(self, level: FloatArray, visible: IntArray) -> NDArray[np.integer]:
        """(N,) for levels (N,) of tokens that see `visible` (N,) blocks."""
        width = visible if self.width == VISIBLE else np.int32(self.width)
        share = np.clip(1.0 - self.rate * (1.0 - level), self.floor, 1.0)
        # The small offset keeps a level of exactly k / w at k in spite of rounding.
        count = np.ceil(share * width - 1e-9).astype(np.int32)
        return np.clip(count, np.minimum(width, self.least), width)


@dataclass(frozen=True, kw_only=True)
class Ladder(Rule):
    """The value of the first step whose level is at most the token's.

    Attributes:
        steps: (least level, value), levels falling.
        below: The value under the last step.
    """

    steps: tuple[tuple[float, int], ...]
    below: int

    def values(self, level: FloatArray, visible: IntArray) -> NDArray[np.integer]:
        """(N,) for levels (N,); what is visible makes no difference."""
        result = np.full(level.shape, self.below, np.int32)
        for least, value in reversed(self.steps):
            result = np.where(level >= least, np.int32(value), result)
        return result


Rules = tuple[Share | Ladder, ...]


def decide(
    rules: Iterable[Share | Ladder],
    levels: FloatArray,
    positions: IntArray,
    rows: Rows,
    *,
    next_layer: bool,
    last_layer: bool,
    window: int = 0,
) -> None:
    """Write what levels decide.

    Args:
        rules: Of all effectors.
        levels: (N, 5) that one layer released.
        positions: (N,) of the tokens.
        rows: (N,) of that layer, or of the next.
        next_layer: Which of the two.
        last_layer: Whether `rows` are of the last layer.
        window: Of the layer that `rows` are of; 0 for all entries.
    """
    visible = visible_blocks(positions, window)
    for rule in rules:
        field = BY_NAME[rule.field]
        if rule.next_layer != next_layer or (field.last_layer and not last_layer):
            continue
        target = rows[rule.field]
        (target[:, rule.column] if field.width > 1 else target)[:] = rule.values(
            levels[:, index(rule.transmitter)], visible
        )

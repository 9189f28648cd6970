"""A greedy search for levels per layer and transmitter, the same for all tokens.

Starting from rest, it lowers one (layer, transmitter) at a time to the next step of its ladder,
always the one with the least rise in loss, on the text that it is given, per FLOP saved:

1. Measure every single step from the present table: its true rise in loss, by running the text.
2. Take steps in the order of rise over saving until the cost has fallen by `stride`.
3. Measure again, but only the steps that the last known ratios put first (lazy greedy), and go on
   from 2.

A step that saves nothing (serotonin between two thresholds) is joined with the next. The path does
not depend on the costs asked for, so one descent serves them all: the table for a cost lies between
two steps of the path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vesicle.evaluation.methods.ledger import Ledger
from vesicle.evaluation.methods.matching import Matched, match
from vesicle.plan import FloatArray, Method

Cell = tuple[int, int]
"""Layer and transmitter, the latter by its place among those released."""

Losses = Callable[[Sequence[Method]], list[float]]
"""A text's loss, in nats per token, under each of several methods."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """How the oracle searches.

    Attributes:
        step: Deficit between two steps of a ladder.
        stride: Share of the dense cost saved between two rounds of measurement.
        again: Share of the steps that are measured again in a round.
        batch: Steps measured in one forward pass.
    """

    step: float = 0.25
    stride: float = 0.05
    again: float = 1 / 3
    batch: int = 2

    def __post_init__(self) -> None:
        """Check that `batch` is from 1 up, the other numbers above 0 and up to 1.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        for name in ("step", "stride", "again"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: above 0, up to 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; allowed: 1 and above")

    def tokens(self, n_cells: int, length: int, least: float) -> int:
        """Tokens run for one window down to a cost of `least`, roughly."""
        rounds = max(0.0, (1 - least) / self.stride - 1)
        return int(n_cells * length * (1 + self.again * rounds))


class Descent:
    """A text's path from rest downwards."""

    def __init__(self, losses: Losses, ledger: Ledger, config: OracleConfig) -> None:
        """Start at rest.

        Args:
            losses: Runs the text under methods.
            ledger: Prices deficits, at the length for which costs are asked.
            config: How to search.
        """
        shape = (ledger.config.n_layers, len(ledger.config.transmitters))
        self._run, self._ledger, self._config = losses, ledger, config
        rest = np.zeros(shape)
        self._path: list[tuple[float, FloatArray]] = [(ledger.share(rest), rest)]
        self._ratios: dict[Cell, float] = {}

    def at(self, target: float) -> Matched | None:
        """Deficits (L, A), or (T, L, A) where some tokens take the step before; None at the end.

        Args:
            target: Executed share.
        """
        while self._path[-1][0] > target:
            if not self._round():
                return None
        place = next(i for i, (share, _) in enumerate(self._path) if share <= target)
        if place == 0:
            share, rest = self._path[0]
            return Matched(deficits=rest, x=0.0, dither=None, cost_share=share)
        before, after = self._path[place - 1][1], self._path[place][1]
        return match(self._ledger, lambda x: before + x * (after - before), target, high=1.0)

    def losses(self, tables: Sequence[FloatArray]) -> list[float]:
        """The text's loss, in nats per token, under each of several tables of deficits."""
        return self._run([self._ledger.method(self._ledger.table(d)) for d in tables])

    def _round(self) -> bool:
        """Measure, then take steps worth one stride; False if no step is left."""
        share, table = self._path[-1]
        steps = self._steps(share, table)
        if not steps:
            return False
        self._measure(table, steps)
        goal = share - self._config.stride
        for cell in sorted(steps, key=lambda c: self._ratios[c]):
            table = table.copy()
            table[cell] = steps[cell][0]
            share = self._ledger.share(table)
            self._path.append((share, table))
            if share <= goal:
                break
        return True

    def _steps(self, share: float, table: FloatArray) -> dict[Cell, tuple[float, float]]:
        """For each cell that can go lower: its next deficit that saves work, and the saving."""
        found: dict[Cell, tuple[float, float]] = {}
        for cell in np.ndindex(*table.shape):
            lower = table.copy()
            while lower[cell] < 1:
                lower[cell] = min(1.0, float(lower[cell]) + self._config.step)
                saving = share - self._ledger.share(lower)
                if saving > 1e-9:
                    found[(cell[0], cell[1])] = (float(lower[cell]), saving)
                    break
        return found

    def _measure(self, table: FloatArray, steps: dict[Cell, tuple[float, float]]) -> None:
        known = sorted((c for c in steps if c in self._ratios), key=lambda c: self._ratios[c])
        count = max(1, round(self._config.again * len(steps)))
        cells = [c for c in steps if c not in self._ratios] + known[:count]
        tables = [table]
        for cell in cells:
            lower = table.copy()
            lower[cell] = steps[cell][0]
            tables.append(lower)
        losses = self.losses(tables)
        for cell, loss in zip(cells, losses[1:], strict=True):
            self._ratios[cell] = (loss - losses[0]) / steps[cell][1]

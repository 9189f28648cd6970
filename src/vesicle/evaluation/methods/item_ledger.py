"""Prices levels on the items of a task without running the model.

The items of a task differ in length, and only some of their tokens need logits. What levels cost on
them follows from cumulated prices of one long sequence: the work of a span is a difference of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vesicle.cost import price_tokens
from vesicle.evaluation.execution.executors import Span
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.modulator import DECIMALS, Modulator, plan_rows
from vesicle.phases import Phases
from vesicle.plan import FloatArray, Plan
from vesicle.shapes import ModelShape, Overhead
from vesicle.transmitters import NAMES


class ItemLedger(Ledger):
    """Executed share of levels over items, each given by its spans."""

    def __init__(
        self,
        modulator: Modulator,
        shape: ModelShape,
        items: Sequence[Sequence[Span]],
        *,
        screens: bool,
        phases: Phases | None = None,
    ) -> None:
        """For items of these spans.

        Args:
            modulator: Whose effectors and stand-ins act.
            shape: Of the model.
            items: Spans of each item, of the tokens that a budget counts.
            screens: Whether the LM head only looks for the likeliest token, so that dopamine may
                screen it.
            phases: On which tokens controls act.
        """
        self.items = [tuple(spans) for spans in items]
        self._screens = screens
        longest = max(span.stop for spans in self.items for span in spans)
        super().__init__(modulator, shape, longest, phases)
        # Whatever rests on a generated token rests on all that are priced here.
        generated = self.phases.acting(np.zeros(1, bool))[0]
        self._rests = ~generated & (not self.phases.ignores_phase(self.config.transmitters))
        rest = Plan.rest(shape, longest)
        self._dense_items = self._totals(rest, Overhead(), self.items)
        self._dense = int(self._dense_items.sum())

    def plan(self, levels: FloatArray) -> Plan:
        """The Plan for levels (T, L, 5), the screened LM head included."""
        positions = np.arange(len(levels), dtype=np.int32)
        levels = np.where(self._rests, 1.0, levels)
        rows = plan_rows(self.modulator, self.shape, levels.round(DECIMALS), positions)
        if not self._screens:
            rows["head"] = 0
        return Plan(rows=rows)

    def _executed(self, levels: FloatArray) -> int:
        return int(self._totals(self.plan(levels), self._overhead, self.items).sum())

    def each(self, deficits: Sequence[FloatArray]) -> float:
        """Executed share where every item has deficits (T, L, A) of its own.

        Levels of positions beyond T start over, as `ReplayLevels` has it.
        """
        total = 0
        for spans, own in zip(self.items, deficits, strict=True):
            length = max(span.stop for span in spans)
            levels = np.ones((length, self.config.n_layers, len(NAMES)))
            rows = own[np.arange(length) % len(own)]
            levels[..., self.columns] = 1.0 - np.clip(rows, 0.0, 1.0)
            total += int(self._totals(self.plan(levels), self._overhead, [spans]).sum())
        return total / self._dense

    def _totals(
        self, plan: Plan, overhead: Overhead, items: Sequence[Sequence[Span]]
    ) -> NDArray[np.int64]:
        """(N,) FLOPs of each item."""
        costs = price_tokens(plan, self.shape, overhead)
        head = _cumulated(costs["flops_head"])
        body = _cumulated(
            sum(v for k, v in costs.items() if k.startswith("flops_") and k != "flops_head")
        )
        return np.array(
            [
                sum(
                    int(body[s.stop] - body[s.start] + head[s.stop] - head[min(s.head, s.stop)])
                    for s in spans
                )
                for spans in items
            ],
            np.int64,
        )


def _cumulated(values: NDArray[np.int64] | int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(values)])

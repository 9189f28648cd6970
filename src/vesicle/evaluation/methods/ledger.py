"""What levels cost on items without running the model.

No control reads hidden states: its Plan, and so its exact cost, follow from its levels alone. Items
differ in length, and only some of their tokens need logits. What levels cost on them follows from
cumulated prices of one long sequence: the work of a span is a difference of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vesicle.cost import price_tokens
from vesicle.evaluation.execution.executor import Span
from vesicle.modulator import DECIMALS, Modulator, ModulatorMethod, plan_rows
from vesicle.phases import Phases
from vesicle.plan import FloatArray, Plan, rest_head
from vesicle.predictors import ConstantLevels, Levels, PredictorConfig, ReplayLevels
from vesicle.shapes import ModelShape, Overhead
from vesicle.transmitters import NAMES, index

Deficits = FloatArray | list[FloatArray]
"""1 - level: (L, A) or (T, L, A) for all items, or (T, L, A) for each of them."""


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
    """Executed share of levels over items, each given by its spans.

    Attributes:
        n_tokens: The longest item's.
        config: Of the modulator's predictor.
        columns: Of the transmitters that it releases.
    """

    def __init__(
        self,
        modulator: Modulator,
        shape: ModelShape,
        items: Sequence[Sequence[Span]],
        *,
        screens: bool = False,
        phases: Phases | None = None,
    ) -> None:
        """For items of these spans.

        Args:
            modulator: Whose effectors and stand-ins act.
            shape: Of the model.
            items: Spans of each item, of the tokens that a budget counts.
            screens: Whether the LM head only looks for the likeliest token.
            phases: On which tokens controls act.
        """
        self.modulator, self.shape, self._screens = modulator, shape, screens
        self.items = [tuple(spans) for spans in items]
        self.n_tokens = max(span.stop for spans in self.items for span in spans)
        self.phases = phases or Phases()
        self.config: PredictorConfig = modulator.predictor.config
        self.columns = [index(name) for name in self.config.transmitters]
        self._overhead = self.method(ConstantLevels(self.config, 1.0)).overhead(shape)
        # Whatever rests on a generated token rests on all that are priced here.
        generated = self.phases.acting(np.zeros(1, bool))[0]
        self._rests = ~generated & (not self.phases.ignores_phase(self.config.transmitters))
        rest = Plan.rest(shape, self.n_tokens)
        self._dense = int(self._totals(rest, Overhead(), self.items).sum())

    def method(self, levels: Levels) -> ModulatorMethod:
        """The Method of a control."""
        return self.modulator.with_levels(levels).at(1.0, self.phases)

    def table(self, deficits: FloatArray) -> Levels:
        """Deficits (L, A) or (T, L, A) as a control."""
        levels = 1.0 - np.clip(deficits, 0.0, 1.0)
        kind = ReplayLevels if levels.ndim == 3 else ConstantLevels
        return kind(self.config, levels)

    def share(self, deficits: Deficits) -> float:
        """Executed FLOPs under deficits as a share of the dense model's."""
        if isinstance(deficits, list):
            return self.each(deficits)
        levels = np.ones((self.n_tokens, self.config.n_layers, len(NAMES)))
        levels[..., self.columns] = 1.0 - np.clip(deficits, 0.0, 1.0)
        total = self._totals(self.plan(levels), self._overhead, self.items).sum()
        return int(total) / self._dense

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

    def plan(self, levels: FloatArray) -> Plan:
        """The Plan for levels (T, L, 5), with what the LM head leaves out."""
        positions = np.arange(len(levels), dtype=np.int32)
        levels = np.where(self._rests, 1.0, levels)
        rows = plan_rows(self.modulator, self.shape, levels.round(DECIMALS), positions)
        if self._screens:
            rows["logits"] = 0
        else:
            rest_head(rows, but="logits")
        return Plan(rows=rows)

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

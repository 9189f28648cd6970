"""What levels cost on sequences of one length, without running the model.

No control reads hidden states: its Plan, and so its exact cost, follow from its levels alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vesicle.cost import price, price_dense
from vesicle.modulator import DECIMALS, Modulator, ModulatorMethod, plan_rows
from vesicle.phases import Phases
from vesicle.plan import FloatArray, Plan
from vesicle.predictors import ConstantLevels, Levels, PredictorConfig, ReplayLevels
from vesicle.shapes import ModelShape
from vesicle.transmitters import NAMES, index

Deficits = FloatArray | list[FloatArray]
"""1 - level: (L, A) or (T, L, A) for all sequences, or (T, L, A) for each of them."""


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

    def share(self, deficits: Deficits) -> float:
        """The same for deficits (L, A) or (T, L, A), or for those of each sequence."""
        if isinstance(deficits, list):
            return self.each(deficits)
        levels = np.ones((self.n_tokens, self.config.n_layers, len(NAMES)))
        levels[..., self.columns] = 1.0 - np.clip(deficits, 0.0, 1.0)
        return self._executed(levels) / self._dense

    def each(self, deficits: Sequence[FloatArray]) -> float:
        """The same where every sequence has deficits (T, L, A) of its own."""
        return float(np.mean([self.share(own) for own in deficits]))

    def _executed(self, levels: FloatArray) -> int:
        """FLOPs of levels (T, L, 5)."""
        plan = plan_from_levels(self.modulator, self.shape, levels)
        return price(plan, self.shape, self._overhead).flops_total

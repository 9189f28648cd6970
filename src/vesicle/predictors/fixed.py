"""Controls: levels that no one learnt. A learnt predictor must beat them at equal executed cost.

- `constant`: a table of levels, one number, one per transmitter, or one per layer and transmitter;
- `random`: independent per token and layer, around such a table;
- `shuffled`: levels released by another predictor, permuted in time within each layer, so that
  every layer and transmitter keeps its distribution and only the *when* is lost;
- `replay`: released levels again, unpermuted.

None of them reads the hidden state; their cost in the ledger is zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vesicle.plan import FloatArray
from vesicle.predictors.base import Levels, PredictorConfig, State


class _Fixed(Levels):
    @property
    def flops(self) -> int:
        """Nothing is computed."""
        return 0

    @property
    def weights_read(self) -> int:
        """Nothing is read."""
        return 0


class ConstantLevels(_Fixed):
    """The same levels for every token."""

    kind = "constant"

    def __init__(self, config: PredictorConfig, levels: FloatArray | float) -> None:
        """Take `levels` as a number, (A,) or (L, A), in [0, 1].

        Raises:
            ValueError: If a level is outside [0, 1].
        """
        super().__init__()
        self.config = config
        shape = (config.n_layers, len(config.transmitters))
        table = np.array(np.broadcast_to(np.asarray(levels, np.float64), shape))
        if not ((table >= 0) & (table <= 1)).all():
            raise ValueError(f"levels run from {table.min()} to {table.max()}; allowed: 0 to 1")
        self.table = torch.from_numpy(table)

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """(B, T, A); the dial does not move a constant."""
        return self.table[layer].expand(*positions.shape, -1)


class RandomLevels(_Fixed):
    """Deficits drawn anew for each token, layer and transmitter: those of a table times U(0, 2)."""

    kind = "random"

    def __init__(self, config: PredictorConfig, levels: FloatArray | float, seed: int) -> None:
        """Draw around `levels` (as for `ConstantLevels`), reproducibly from `seed`."""
        super().__init__()
        self.config = config
        self.mean = ConstantLevels(config, levels).table
        self.seed = seed

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """(B, T, A), a function of seed, position, layer and transmitter only."""
        n = len(self.config.transmitters)
        counter = (positions[..., None] * self.config.n_layers + layer) * n + torch.arange(n)
        noise = _uniform(counter, self.seed)
        return (1 - (1 - self.mean[layer]) * 2 * noise).clamp(0, 1)


class ReplayLevels(_Fixed):
    """Levels (T, L, A) recorded earlier, by position."""

    kind = "replay"

    def __init__(self, config: PredictorConfig, levels: FloatArray) -> None:
        """Take recorded `levels` (T, L, A)."""
        super().__init__()
        self.config = config
        self.levels = torch.from_numpy(np.asarray(levels, np.float64))

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """(B, T, A); positions beyond the record start over."""
        return self.levels[positions % len(self.levels), layer]


class ShuffledLevels(ReplayLevels):
    """Levels (T, L, A) recorded earlier, each layer permuted in time."""

    kind = "shuffled"

    def __init__(self, config: PredictorConfig, levels: FloatArray, seed: int) -> None:
        """Permute with a generator seeded by `seed`; transmitters of a layer move together."""
        generator = np.random.default_rng(seed)
        mixed = np.stack(
            [levels[generator.permutation(len(levels)), i] for i in range(config.n_layers)], axis=1
        )
        super().__init__(config, mixed)


def _uniform(counter: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) per counter, from a hash: chunks of a sequence draw as the whole."""
    phase = (counter.double() + 1.0) * 12.9898 + (seed % 10007) * 78.233 + math.pi
    return torch.frac(torch.sin(phase) * 43758.5453).abs()

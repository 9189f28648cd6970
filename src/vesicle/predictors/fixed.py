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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vesicle.plan import FloatArray
from vesicle.predictors.base import Levels, PredictorConfig, State


class _Fixed(Levels):
    @property
    def flops(self) -> int:
        """FLOPs per token and layer: 0, as nothing is computed from the hidden state."""
        return 0

    @property
    def weights_read(self) -> int:
        """Numbers read per token and layer: 0, as controls have no weights."""
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
        """Draw around `levels` (as for `ConstantLevels`), reproducibly from `seed`, 0 or above."""
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

    def __init__(
        self, config: PredictorConfig, levels: FloatArray, seed: int | Sequence[int]
    ) -> None:
        """Permute with a generator seeded by `seed`; transmitters of a layer move together."""
        generator = np.random.default_rng(seed)
        mixed = np.stack(
            [levels[generator.permutation(len(levels)), i] for i in range(config.n_layers)], axis=1
        )
        super().__init__(config, mixed)


def spread_seed(seed: int, place: int) -> list[int]:
    """The seed of one of many draws of a run: no two runs share a draw, at whatever places.

    Args:
        seed: Of the run, 0 or above.
        place: Which draw, from 0 to below 2**32.

    Returns:
        Words for `np.random.default_rng`. NumPy leaves trailing zeros out of account, so that those
        of a run with seed 0 draw as `place` alone does.
    """
    return [place, seed]


def _uniform(counter: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) per counter, from a hash: chunks of a sequence draw as the whole.

    Seed 0 keeps the draws that committed results were made with. All others go through an integer
    hash, in which no two seeds are shifts of each other.
    """
    if seed == 0:
        phase = (counter.double() + 1.0) * 12.9898 + math.pi
        return torch.frac(torch.sin(phase) * 43758.5453).abs()
    first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64).view(np.int64)
    mixed = _mix(counter.long() * _GOLDEN + int(first)) ^ int(second)
    return _shifted(_mix(mixed), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014); int64 arithmetic wraps as it needs."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
